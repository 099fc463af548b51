"""Our FP8 forward beside FlashAttention-3's in one process: `python -m fasim.kernels.measure.beside_fp8 --out DIR`.

The wheel fa3-fwd must be importable (`fa3_fwd_interface`). At 16k tokens and hidden size 2048, each head dim, length and mask:
bursts of 10 ms in shuffled turns after a rest, each behind a kernel that sleeps while the host runs ahead, so that no host code is
timed; the median over all calls between CUDA events. N(0, 1) in e4m3 without descales, O in bf16, held to fp64 first. Ours also
with approximate exponentials, where there are such, and with V as rows of keys: that is another contract, the transposition that
FlashAttention-3 has in its time is not in ours. So there are times from bf16 to O too, where it is: ours quantises by blocks, with
the Hadamard transform, and writes V across on the way; theirs is three casts, without descales, and the call. Writes fp8.json.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib
import importlib.metadata
import itertools
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..cuda.fp8 import config, keyed_launch, launch
from ..fp8.keyed import as_rows_of_keys
from ..ops import flash_attn_fp8, flash_attn_func
from ..reference import attention_forward
from .board import Board

TOKENS, HIDDEN = 16384, 2048
LENGTHS = {64: (4096, 16384), 128: (1024, 2048, 4096, 8192, 16384), 256: (4096, 16384)}
LENGTHS_FROM_BF16 = {64: (4096, 16384), 128: (2048, 4096, 16384), 256: (4096, 16384)}
ROUNDS, REST_S, BURST_S = 5, 0.08, 0.01
SLEEP_CYCLES = 20_000_000
MOST_CALLS = 100
SETS = 2
TOLERANCE, TOLERANCE_FROM_BF16 = 0.04, 0.08
"""Relative error of O above which a kernel is not timed: weights are rounded to three bits, and so are Q, K and V of bf16."""
CHECKED_ROWS = 192
PEER = "FlashAttention-3"
OURS, APPROXIMATE, KEYED = "fa3", "fa3 approximate", ", V as rows of keys"
FROM_BF16 = " from bf16"

Call = Callable[..., Tensor]


def peer(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """O of the wheel's."""
    found = importlib.import_module("fa3_fwd_interface").flash_attn_func(q, k, v, causal=causal)
    return found[0] if isinstance(found, tuple) else found


def calls(head_dim: int, causal: bool) -> dict[str, Call]:
    """Ours and the wheel's, each f(q, k, v, rows of keys of v) -> O of e4m3 tensors."""
    named: dict[str, Call] = {}
    for name, approximate in ((OURS, False), (APPROXIMATE, True)):
        if approximate and head_dim not in config.APPROXIMATE:
            continue
        choice = {"causal": causal, "approximate": approximate}
        named[name] = lambda q, k, v, across, choice=choice: launch.forward(q, k, v, **choice)[0]
        named[name + KEYED] = lambda q, k, v, across, choice=choice: keyed_launch.forward(q, k, across, **choice)[0]
    return named | {PEER: lambda q, k, v, across: peer(q, k, v, causal)}


def calls_from_bf16(head_dim: int, causal: bool) -> dict[str, Call]:
    """Ours in FP8 and in bf16, and the wheel's, each f(q, k, v) -> O of bf16 tensors."""
    named: dict[str, Call] = {OURS: lambda q, k, v: flash_attn_fp8(q, k, v, causal=causal)}
    if head_dim in config.APPROXIMATE:
        named[APPROXIMATE] = lambda q, k, v: flash_attn_fp8(q, k, v, causal=causal, approximate=True)
    named["fa3 in bf16"] = lambda q, k, v: flash_attn_func(q, k, v, causal=causal)
    named[PEER] = lambda q, k, v: peer(*(x.to(torch.float8_e4m3fn) for x in (q, k, v)), causal)
    return {name + FROM_BF16: call for name, call in named.items()}


def drawn(seqlen: int, head_dim: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k and v."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (TOKENS // seqlen, seqlen, HIDDEN // head_dim, head_dim)
    return tuple(torch.randn(shape, device="cuda", dtype=torch.float16, generator=generator).to(dtype) for _ in range(3))


def inputs(seqlen: int, head_dim: int, seed: int) -> tuple[Tensor, ...]:
    """q, k and v in e4m3, and v as rows of keys."""
    q, k, v = drawn(seqlen, head_dim, seed, torch.float8_e4m3fn)
    return q, k, v, as_rows_of_keys(v)


def error(o: Tensor, qkv: Sequence[Tensor], causal: bool) -> float:
    """The largest relative error of O, of the first and the last rows of the first and the last head."""
    q, k, v = qkv
    worst, seqlen = 0.0, q.shape[1]
    for batch, head in ((0, 0), (q.shape[0] - 1, q.shape[2] - 1)):
        for first in (0, seqlen - CHECKED_ROWS):
            at = slice(batch, batch + 1), slice(first, first + CHECKED_ROWS), slice(head, head + 1)
            keys = at[0], slice(0, first + CHECKED_ROWS if causal else seqlen), at[2]
            wanted = attention_forward(q[at], k[keys], v[keys], causal=causal).o
            worst = max(worst, float((o[at].double() - wanted).norm() / wanted.norm()))
    return worst


def burst(call: Call, sets: Sequence[Sequence[Tensor]], count: int, board: Board | None = None) -> tuple[list[float], float | None]:
    """Milliseconds of each call but the first, and the SM clock in MHz meanwhile, where a board is asked."""
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for number in range(count):
        call(*sets[number % len(sets)])
        events[number + 1].record()
    clock = None
    if board is not None:
        events[1].synchronize()
        clock = board.sample().clock_hz / 1e6
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events[1:])], clock


def measured(named: dict[str, Call], sets: Sequence[Sequence[Tensor]], board: Board) -> dict[str, tuple[list[float], float]]:
    """Every call's milliseconds, sorted, and the median of the clocks."""
    counts = {name: math.ceil(1000 * BURST_S / statistics.median(burst(call, sets, 6)[0])) for name, call in named.items()}
    found: dict[str, list[float]] = {name: [] for name in named}
    clocks: dict[str, list[float]] = {name: [] for name in named}
    turns = random.Random(TOKENS)
    for _ in range(ROUNDS):
        for name in turns.sample(list(named), len(named)):
            torch.cuda.synchronize()
            time.sleep(REST_S)
            times, clock = burst(named[name], sets, max(6, min(MOST_CALLS, counts[name])), board)
            found[name] += times
            clocks[name].append(clock)
    return {name: (sorted(times), statistics.median(clocks[name])) for name, times in found.items()}


def case(seqlen: int, head_dim: int, causal: bool, board: Board, from_bf16: bool = False) -> list[dict]:
    """One row a kernel; one that is wrong says so and has no time."""
    if from_bf16:
        sets = [drawn(seqlen, head_dim, seed, torch.bfloat16) for seed in range(SETS)]
        named, tolerance = calls_from_bf16(head_dim, causal), TOLERANCE_FROM_BF16
    else:
        sets, named, tolerance = [inputs(seqlen, head_dim, seed) for seed in range(SETS)], calls(head_dim, causal), TOLERANCE
    shape = {"batch": TOKENS // seqlen, "heads": HIDDEN // head_dim, "seqlen": seqlen, "head_dim": head_dim, "causal": causal}
    rows = {name: {"kernel": name, "dtype": "bf16" if from_bf16 else "e4m3", **shape} for name in named}
    for name, call in list(named.items()):
        rows[name]["relative_error"] = off = error(call(*sets[0]), sets[0][:3], causal)
        if not off <= tolerance:
            rows[name]["refused"] = f"its relative error {off:.1e} is above {tolerance:.1e}"
            del named[name]
    flops = 4 * TOKENS * seqlen * HIDDEN / (2 if causal else 1)
    for name, (times, clock) in measured(named, sets, board).items():
        middle = statistics.median(times)
        rows[name] |= {
            "median_ms": round(middle, 5),
            "p10_ms": round(times[len(times) // 10], 5),
            "p90_ms": round(times[len(times) * 9 // 10], 5),
            "calls": len(times),
            "tflops": round(flops / middle / 1e9, 1),
            "sm_clock_mhz": clock,
        }
    return list(rows.values())


def sources() -> dict[str, str]:
    """SHA-256 of what our kernels are made of, by path from the root."""
    root = config.HERE.parents[2]
    room = config.HERE.parent
    paths = [*config.HERE.glob("*.cuh"), config.HERE / "wgmma.py", config.HERE / "config.py", room / "fa3.cu"]
    paths += [room / "overlap_2stage.cu", *room.glob("*.cuh"), config.HERE / "keyed" / "producer.cuh"]
    paths += [config.HERE / "quantise.cu", config.HERE / "quantise.py"]
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def record(keep: Callable[[dict], None], say: Callable[[str], None] = lambda line: None) -> None:
    """All rows and where they come from, kept after every case."""
    board = Board(torch.cuda.current_device(), f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}")
    packages = {name: importlib.metadata.version(name) for name in ("torch", "cuda-bindings", "nvidia-cuda-nvrtc")}
    found = {
        "schema": "fasim.kernel-times/1",
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "driver": board.driver,
        "cuda": torch.version.cuda,
        "packages": packages,
        "peer": "fa3-fwd 0.0.3",
        "protocol": {
            "rounds": ROUNDS,
            "rest_s": REST_S,
            "burst_s": BURST_S,
            "buffers": SETS,
            "data": "normal",
            "statistic": "median",
        },
        "source": "kernels/measure/beside_fp8.py",
        "source_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "kernel_sha256": sources(),
        "rows": [],
    }
    for from_bf16, of in ((False, LENGTHS), (True, LENGTHS_FROM_BF16)):
        for head_dim, seqlen in ((head_dim, seqlen) for head_dim, lengths in of.items() for seqlen in lengths):
            for causal in (False, True):
                *ours, theirs = case(seqlen, head_dim, causal, board, from_bf16)
                found["rows"] += [*ours, theirs]
                keep(found)
                for row in ours:
                    name = f"{row['kernel']} d{head_dim} {seqlen} {'causal' if causal else 'full'}"
                    if "tflops" in row and "tflops" in theirs:
                        times = theirs["median_ms"] / row["median_ms"]
                        say(f"{name}: {row['tflops']:.0f}, {PEER} {theirs['tflops']:.0f} TFLOP/s, {times:.3f}")
                    else:
                        say(f"{name}: {row.get('refused')}, {theirs.get('refused')}")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m fasim.kernels.measure.beside_fp8", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    def keep(found: dict) -> None:
        (out / "fp8.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    record(keep, lambda line: sys.stderr.write(line + "\n"))


if __name__ == "__main__":
    main()
