"""Times the CUDA backward: `python -m fasim.kernels.cuda.backward.pace [--out FILE]`.

bf16, 16k tokens, hidden size 2048; CUDA events around each call of a burst after a rest, TFLOP/s as 2.5 times the forward's. Beside
the whole call the main kernel alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

from .check import has_gpu, say
from .config import HEAD_DIMS, SCHEDULES, TILES

TOKENS, HIDDEN = 16384, 2048
WARM, MOST_CALLS, BURST_MS, REST = 2, 10, 40, 0.4


def flops(seqlen: int, causal: bool) -> float:
    """Of a backward: five GEMMs for the forward's two."""
    return 2.5 * 4 * TOKENS * seqlen * HIDDEN * (0.5 if causal else 1.0)


def milliseconds(call) -> float:
    """The median of a burst."""
    import torch

    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    call()
    events[1].record()
    torch.cuda.synchronize()
    calls = max(3, min(MOST_CALLS, int(BURST_MS / events[0].elapsed_time(events[1]))))
    time.sleep(REST)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(WARM + calls + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(events[WARM:-1], events[WARM + 1 :], strict=True))


def measure(
    schedule: str, head_dim: int, seqlen: int, causal: bool, dtype: str = "bf16", deterministic: bool = False, split: bool = False
) -> dict:
    """One shape: milliseconds of the call and of each kernel."""
    import torch

    from .. import launch as forward
    from . import launch

    batch, heads = TOKENS // seqlen, HIDDEN // head_dim
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    q, k, v, do = (torch.randn(batch, seqlen, heads, head_dim, device="cuda", dtype=kind) for _ in range(4))
    scale = head_dim**-0.5
    o, lse = forward.forward(q, k, v, scale, causal)
    call = lambda: launch.backward(  # noqa: E731
        q, k, v, o, lse, do, causal=causal, scale=scale, schedule=schedule, deterministic=deterministic
    )
    call()
    whole = milliseconds(call)
    plan = launch.plan_for(
        tuple(q.shape), tuple(k.shape), tuple(x.stride() for x in (q, k, v, o, do)), q.dtype, causal, schedule,
        deterministic, False, q.get_device(),
    )  # fmt: skip
    parts = {}
    if split:
        main, plan.main = plan.main, _Nothing()
        parts["prepare"] = milliseconds(call)
        plan.main = main
    main = flops(seqlen, causal) / (whole - sum(parts.values())) / 1e9
    row = {
        "schedule": schedule, "head_dim": head_dim, "seqlen": seqlen, "causal": causal, "dtype": dtype,
        "deterministic": deterministic, "tile": str(plan.config.tile), "ms": whole, "parts_ms": parts,
        "tflops": flops(seqlen, causal) / whole / 1e9, "main_tflops": main,
    }  # fmt: skip
    around = ", ".join(f"{part} {ms * 1e3:.0f} us" for part, ms in parts.items())
    flags = ("causal" if causal else "full") + " deterministic" * deterministic
    say(
        f"{schedule} {dtype} d{head_dim} {seqlen:6d} {flags:6} {row['tile']}: {whole:7.3f} ms {row['tflops']:6.1f} TFLOP/s,"
        f" main {main:6.1f}; {around}"
    )
    return row


class _Nothing:
    def launch(self, *_arguments: int) -> None:
        """No kernel."""


def main() -> int:
    """Every shape asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), help="of each those that have the head dim")
    parser.add_argument("--head-dims", type=int, nargs="+", default=list(HEAD_DIMS))
    parser.add_argument("--seqlens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--split", action="store_true", help="the preprocess apart")
    parser.add_argument("--whole-tiles", action="store_true", help="no tile of keys is shared by two CTAs")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no shape behind so many")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not has_gpu():
        say("no GPU here: it needs an H100 or H200")
        return 3
    from . import launch

    launch.SHARE_TILES = not args.whole_tiles
    rows: list[dict] = []
    shapes = itertools.product(args.head_dims, args.seqlens, (False, True), args.schedules)
    began, left = time.monotonic(), [each for each in shapes if (each[3], each[0], each[2]) in TILES]
    while left and time.monotonic() - began < args.seconds:
        head_dim, seqlen, causal, schedule = left.pop(0)
        rows.append(measure(schedule, head_dim, seqlen, causal, deterministic=args.deterministic, split=args.split))
        if args.out:
            args.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if left:
        say(f"{len(left)} shapes not begun within {args.seconds:g} seconds")
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main())
