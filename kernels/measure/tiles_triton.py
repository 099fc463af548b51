"""Every tile of our Triton forward that could win, beside FlashAttention-3: `python -m fasim.kernels.measure.tiles_triton`.

Each tile by the text that stands and by kernels/launch/bounded.py's in two walks and in one, compiled a process a core, launched
past Triton's launcher, held to fp64 and timed as beside_gluon.py does: graphs, in bursts, in shuffled turns; 1k and 16k first. Then
what a call costs on the host. Writes DIR/tiles_triton.json after every shape and stops at the deadline; the fastest of each shape
goes to stdout. `--compile-only` needs no GPU and lists what spills or is serialised.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ...simulator.code import sass
from ...simulator.problem.workload import Workload
from .. import ops
from ..compile import disassemble
from ..launch import fa2
from ..triton.tiles import TritonTile
from . import beside_gluon, peers
from .beside_gluon import PEER

_T = TritonTile
TILES = {
    64: (_T(64, 128, 4, 3), _T(64, 128, 4, 3, overlapped=True), _T(128, 64, 4, 3), _T(64, 64, 4, 3),
         _T(64, 64, 4, 3, overlapped=True), _T(128, 128, 8, 3, overlapped=True)),
    128: (_T(128, 128, 8, 3, overlapped=True), _T(128, 64, 4, 2), _T(64, 64, 4, 3), _T(64, 64, 4, 3, overlapped=True)),
    256: (_T(128, 64, 8, 2), _T(64, 64, 4, 2)),
}  # fmt: skip
MANY_KEYS = 8192
"""From here on the heads that are walked side by side are a question of L2: fewer are tried too."""
LENGTHS = (1024, 16384, 4096, 512)
ROUNDS = 3
DEADLINE_S = 150
STANDING = "fa2"
"""As ops.flash_attn_func runs it today."""


def candidates(workload: Workload) -> dict[str, fa2.Fa2Config]:
    """Every kernel that is timed for a workload, by its name."""
    shape_q = (workload.batch, workload.seqlen_q, workload.heads, workload.head_dim)
    shape_k = (workload.batch, workload.seqlen_k, workload.kv_heads, workload.head_dim)
    found = (
        fa2.config_of(shape_q, shape_k, workload.dtype, workload.causal, tile, bounded, one_walk)
        for tile in TILES[workload.head_dim]
        for bounded, one_walk in ((True, False), (True, True), (False, False))
    )
    named = {config.name: config for config in found}
    for heads in {1, 2, 4} if workload.causal and workload.seqlen_k >= MANY_KEYS else ():
        for name, config in list(named.items()):
            if config.bounded and config.one_walk and config.tile.overlapped and heads < config.together:
                named[f"{name}, {heads} heads together"] = replace(config, together=heads)
    return named


def workloads(head_dims: list[int], seqlens: list[int]) -> list[Workload]:
    """The papers' setting, bf16, as beside_gluon.py has it; head dims in turn at each length."""
    return [work for seqlen in seqlens for head_dim in head_dims for work in beside_gluon.workloads([head_dim], [seqlen], "bf16")]


def attention_of(kernel: str, workload: Workload) -> Callable:
    """f(q, k, v) -> O or (O, LSE)."""
    if kernel == STANDING:
        return lambda q, k, v: ops.flash_attn_func(q, k, v, causal=workload.causal, schedule="fa2")
    if peers.is_peer(kernel):
        return peers.prepare(kernel, workload)
    config, plans = candidates(workload)[kernel], []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple:
        if not plans:
            plans.append(fa2.Plan(config, q, k, v))
        return plans[0].run(q, k, v, workload.head_dim**-0.5)

    return attend


def resources_of(kernel: str, workload: Workload) -> dict:
    """Tile, shared memory, and who compiled it."""
    config = candidates(workload).get(kernel)
    if config is None:
        return {}
    tile, built = config.tile, fa2.build(config)
    return {
        "tile": vars(tile), "bounded": config.bounded, "one_walk": config.one_walk, "together": config.together,
        "smem_bytes": built.smem_bytes, "compiler": built.compiler,
    }  # fmt: skip


def flaws(config: fa2.Fa2Config) -> str:
    """What is wrong with a kernel's loop by its machine code: spills, GEMMs that the assembler serialised; or ""."""
    (code,) = disassemble.of_cubin(fa2.build(config).cubin)
    said = set()
    for loop in sass.loops(code):
        body = code.instructions[loop.start : loop.end + 1]
        gemms = sum(each.name == "HGMMA" for each in body)
        if gemms > 4 and sum("WARPGROUP.ARRIVE" in each.opcode for each in body) == gemms:
            said.add("GEMMs serialised")
        if local := sum(each.name in ("LDL", "STL") for each in body):
            said.add(f"{local} accesses to local memory")
    return ", ".join(sorted(said))


def host() -> dict:
    """Microseconds of a call on the host: by Triton's launcher, and past it."""
    from .host_overhead import SHAPE, host_us

    q, k, v = (torch.randn(SHAPE, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    plan = fa2.plan_for(q, k, v, False)
    found, was = {"the plan alone": host_us(lambda: plan.run(q, k, v, SHAPE[3] ** -0.5))}, ops.PLANNED_FA2
    try:
        for name, ops.PLANNED_FA2 in (("by Triton's launcher", False), ("past Triton's launcher", True)):
            ops.forget_plans()
            found[name] = host_us(lambda: ops.flash_attn_func(q, k, v, schedule="fa2"))
    finally:
        ops.PLANNED_FA2 = was
        ops.forget_plans()
    return {name: round(us, 2) for name, us in found.items()}


def main() -> None:
    """Compile, measure, write DIR/tiles_triton.json, show the fastest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--head-dims", nargs="+", type=int, choices=tuple(TILES), default=[128])
    parser.add_argument("--seqlens", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--deadline", type=float, default=DEADLINE_S, help="seconds from the start; a shape begun is ended")
    parser.add_argument("--compile-only", action="store_true")
    given = parser.parse_args()
    end = time.monotonic() + given.deadline
    works = workloads(given.head_dims, given.seqlens)
    asked = {config: None for work in works for config in candidates(work).values()}
    refused = fa2.build_all(asked)
    if given.compile_only:
        for config, why in refused.items():
            mask = "causal" if config.causal else "full"
            sys.stdout.write(f"d{config.head_dim} {mask} {config.name}: {why or flaws(config) or 'good'}\n")
        return
    given.out.mkdir(parents=True, exist_ok=True)
    _measure(given, works, end, refused)


def _measure(given: argparse.Namespace, works: list[Workload], end: float, refused: dict) -> None:
    meter, rows = beside_gluon.beside.Meter(), []
    sources = [
        Path(fa2.__file__),
        Path(fa2.__file__).with_name("bounded.py"),
        *sorted((Path(ops.__file__).parent / "triton").glob("*.py")),
    ]
    result = {
        "schema": "fasim.triton-tiles/1",
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "driver": meter.driver(),
        "packages": {name: importlib.metadata.version(name) for name in ("torch", "triton")},
        "kernel_sha256": {f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in sources},
        "rounds": given.rounds,
        "host_us": {},
        "not_reached": [],
        "rows": rows,
    }
    try:
        result["host_us"] = host()
    except Exception as error:
        result["host_us"] = {"refused": f"{type(error).__name__}: {error}"[:300]}
    for work in works:
        if time.monotonic() > end:
            result["not_reached"].append(str(work))
            continue
        usable = [name for name, config in candidates(work).items() if not refused[config]]
        kernels = [PEER, STANDING, *usable]
        rows += beside_gluon.run_case(work, kernels, meter, given.rounds, attention_of, resources_of)
        (given.out / "tiles_triton.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        torch.cuda.empty_cache()
        mine = [row for row in rows if row.get("tflops") and row["kernel"] != PEER and _of(row, work)]
        for row in sorted(mine, key=lambda row: -row["tflops"])[:3]:
            sys.stdout.write(f"{work}: {row['kernel']} {row['tflops']} TFLOP/s ({row.get('vs_fa3', 'no peer')})\n")
        sys.stdout.flush()
    (given.out / "tiles_triton.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"host: {result['host_us']}\n")


def _of(row: dict, work: Workload) -> bool:
    return all(row[name] == value for name, value in work.to_dict().items())


if __name__ == "__main__":
    main()
