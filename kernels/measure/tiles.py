"""Every tile of our fa3 that could win, timed: `python -m fasim.kernels.measure.tiles --out DIR`, the truth for `fasim tune`.

Twelve shapes: head dims 64, 128 and 256, full and causal, 1k and 16k long, 16k tokens, hidden size 2048, fp16. Of each the tiles
that the simulator calls legal, compiled in as many processes as there are cores; one that spills is listed and not timed. Bursts
in shuffled turns after a rest, as in beside.py, each output held to the fp64 oracle first. Writes tiles.json after every shape;
progress goes to stderr.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from ...simulator.problem.tile import Tile, default_for
from ...simulator.problem.workload import Workload
from ...simulator.schedules import SCHEDULES
from ...traces.answers.tune import legal_tiles
from ...traces.workers import spawned
from ..compile import build
from ..cuda.config import HEAD_DIMS, KernelConfig

LENGTHS = (1024, 16384)
TOKENS, HIDDEN = 16384, 2048
LEAST_KEYS = {64: 64, 128: 64, 256: 32}
"""Narrower tiles are left out: each K/V block would be mostly overhead, and the model has them far behind."""
STAGES = (2, 3)
LONE_KEYS = 112
"""A single consumer has nobody to take turns with: only its widest tiles are timed."""
ROUNDS, REST_S, BURST_S = 3, 0.04, 0.006
TOLERANCE = 2e-3


def shapes() -> Iterator[Workload]:
    """The twelve shapes."""
    for head_dim in HEAD_DIMS:
        for causal in (False, True):
            for length in LENGTHS:
                yield Workload(TOKENS // length, HIDDEN // head_dim, length, head_dim, "fp16", causal)


def tiles_of(workload: Workload, schedule: str = "fa3") -> list[Tile]:
    """The legal tiles that are timed, the table's own among them."""
    usual, _ = default_for(SCHEDULES[schedule].family, workload)
    found = [
        tile
        for tile in legal_tiles(workload, schedule, "h200")
        if tile.stages in STAGES and tile.block_n >= (LEAST_KEYS[workload.head_dim] if tile.consumers > 1 else LONE_KEYS)
    ]
    return list(dict.fromkeys([usual, *found]))


def _compile(config: KernelConfig) -> str:
    """Empty, or why the kernel is not timed."""
    try:
        report = build.build(config.source).report
    except build.CompileError as error:
        return str(error)[:200]
    return f"spills {report.spill_bytes} bytes" if report.spill_bytes else ""


def main(argv: list[str] | None = None) -> int:
    """The command line; see the module's own words."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--schedule", default="fa3")
    parser.add_argument("--head-dims", type=int, nargs="+", choices=HEAD_DIMS, default=HEAD_DIMS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--compile-only", action="store_true")
    asked = parser.parse_args(argv)
    chosen = [workload for workload in shapes() if workload.head_dim in asked.head_dims]
    wanted = {workload: tiles_of(workload, asked.schedule) for workload in chosen}
    configs = {
        (workload, tile): KernelConfig(asked.schedule, workload.dtype, workload.head_dim, workload.causal, tile)
        for workload, tiles in wanted.items()
        for tile in tiles
    }
    distinct = list(dict.fromkeys(configs.values()))
    _say(f"{len(distinct)} kernels for {len(configs)} timings")
    with spawned(len(os.sched_getaffinity(0))) as pool:
        refused = dict(zip(distinct, pool.map(_compile, distinct), strict=True))
    _say(f"compiled; {sum(map(bool, refused.values()))} are not timed")
    if asked.compile_only:
        for config, why in refused.items():
            _say(f"{config.name} {config.tile.to_dict()} {why or 'compiles'}")
        return 0
    _measure(asked.out, asked.rounds, wanted, configs, refused)
    return 0


def _measure(out: Path, rounds: int, wanted: dict, configs: dict, refused: dict) -> None:
    import torch

    from ..arguments import scale_of
    from ..cuda.launch import Plan, kernel_for
    from . import beside

    meter, rows = beside.Meter(), []
    head = {
        "gpu": torch.cuda.get_device_name(), "driver": meter.driver(), "cuda": torch.version.cuda, "torch": torch.__version__,
        "date": datetime.date.today().isoformat(), "rest_s": REST_S, "burst_s": BURST_S, "rounds": rounds,
        "compiler": build.compiler_version(),
    }  # fmt: skip
    for workload, tiles in wanted.items():
        case = beside.Case(False, workload)
        sets = beside.buffers(case)
        shape, strides = tuple(sets[0][0].shape), (sets[0][0].stride(),) * 3
        calls, found = {}, {}
        for tile in tiles:
            config = configs[workload, tile]
            name = json.dumps(tile.to_dict())
            found[name] = {**workload.to_dict(), "tile": tile.to_dict(), "source": config.source.digest}
            if refused[config]:
                found[name]["refused"] = refused[config]
                continue
            try:
                plan = Plan(kernel_for(config, 0), shape, shape, strides, 0)
                scale = scale_of(None, workload.head_dim)

                def call(number: int, plan: Plan = plan, scale: float = scale, sets: list = sets) -> torch.Tensor:
                    return plan.run(*sets[number][:3], scale)[0]

                error = found[name]["relative_error"] = beside.error_of(call, case, sets[0])
                torch.cuda.synchronize()
            except Exception as broken:
                found[name]["refused"] = f"{type(broken).__name__}: {broken}"[:200]
                continue
            if error <= TOLERANCE:
                calls[name] = call
            else:
                found[name]["refused"] = f"its relative error {error:.1e} is above {TOLERANCE:.0e}"
        timed = beside.in_turns(calls, case.flops, meter, rounds, BURST_S, REST_S, seed=workload.seqlen)
        rows += [row | timed.get(name, {}) for name, row in found.items()]
        (out / "tiles.json").write_text(json.dumps({"what": __doc__.splitlines()[0], **head, "rows": rows}, indent=1) + "\n")
        best = min(timed, key=lambda name: timed[name]["median_ms"])
        _say(f"{workload}: {len(timed)} tiles, best {best} {timed[best]['tflops']} TFLOP/s")


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
