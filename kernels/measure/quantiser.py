"""The FP8 quantiser beside a copy, and FP8 from bf16 beside bf16: `python -m fasim.kernels.measure.quantiser --out DIR`.

Of 16k rows and hidden size 2048, bf16, in each head dim and block: the share of a copy's bytes a second that the quantiser
reaches (2 read, 1 written an element), without and with the Hadamard transform; and how many of its values differ from
`plain.quantise`'s. Then Q, K and V of a call in one launch, V as rows of keys. From bf16 to O: flash_attn_fp8 and our bf16
kernel. Medians of calls between CUDA events, in bursts behind a kernel that sleeps (beside_fp8.py). Writes fp8_quantiser.json.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..cuda.fp8 import config
from ..cuda.fp8 import quantise as streamed
from ..fp8 import plain
from ..fp8.operator import kv_rows
from ..fp8.quantise import Part, quantise_blocks
from ..ops import flash_attn_fp8, flash_attn_func
from .beside_fp8 import burst

BATCH, ROWS, HIDDEN = 4, 16384, 2048
BLOCKS = {64: (64, 128), 128: (64, 128, 192), 256: (64, 96)}
CALL_LENGTH = 16384
TOKENS, HEADS, LENGTHS = 16384, 16, (1024, 2048, 4096, 16384)
COPIED = 1 << 27  # elements of 16 bits
CALLS, BURSTS, REST_S = 20, 2, 0.03
WAYS = {
    "bf16": lambda q, k, v, causal: flash_attn_func(q, k, v, causal=causal),
    "fp8": lambda q, k, v, causal: flash_attn_fp8(q, k, v, causal=causal),
    "fp8 without Hadamard": lambda q, k, v, causal: flash_attn_fp8(q, k, v, causal=causal, hadamard=False),
    "fp8 approximate": lambda q, k, v, causal: flash_attn_fp8(q, k, v, causal=causal, approximate=True),
}


def milliseconds(call: Callable, sets: Sequence[Sequence[Tensor]]) -> float:
    """The median of a call."""
    burst(call, sets, 3)
    times: list[float] = []
    for _ in range(BURSTS):
        time.sleep(REST_S)
        times += burst(call, sets, CALLS)[0]
    return statistics.median(times)


def differing(x: Tensor, block: int, hadamard: bool) -> tuple[int, int]:
    """Values of the kernel that are not plain torch's, and the most steps of e4m3 between two."""
    want = plain.quantise(x, block, hadamard=hadamard)
    (got,) = quantise_blocks([Part(x, block, hadamard)])
    ours, theirs = (found.values.view(torch.uint8).int() for found in (got, want))
    steps = torch.where((ours ^ theirs) < 128, (ours - theirs).abs(), (ours & 127) + (theirs & 127))
    return int((ours != theirs).sum()), int(steps.max())


def quantisers(say: Callable[[str], None], rate: float) -> list[dict]:
    """A row for each head dim, block and transform."""
    rows = []
    for head_dim, blocks in BLOCKS.items():
        x = torch.randn(BATCH, ROWS, HIDDEN // head_dim, head_dim, device="cuda").bfloat16()
        for block, hadamard in itertools.product(blocks, (False, True)):
            part = Part(x, block, hadamard)
            time_ms = milliseconds(lambda part: quantise_blocks([part]), [(part,)])
            speed = 3 * x.numel() / time_ms / 1e6
            off, steps = differing(x[:1, :4096], block, hadamard)
            row = {"head_dim": head_dim, "block": block, "hadamard": hadamard, "streamed": streamed.takes([part])}
            row |= {"median_ms": round(time_ms, 5), "GBps": round(speed, 1), "of_copy": round(speed / rate, 3)}
            rows.append(row | {"compared": x[:1, :4096].numel(), "differing": off, "most_steps": steps})
            say(f"d{head_dim} block {block}{' Hadamard' * hadamard}: {speed / rate:.3f} of a copy, {off} values differ")
    return rows


def of_a_call(say: Callable[[str], None], rate: float) -> list[dict]:
    """A row for each head dim: Q and K with the transform and V across, by the kernel's blocks, in one launch."""
    rows = []
    for head_dim in BLOCKS:
        q, k, v = (torch.randn(BATCH, CALL_LENGTH, HIDDEN // head_dim, head_dim, device="cuda").bfloat16() for _ in range(3))
        own = kv_rows(head_dim, CALL_LENGTH)
        parts = [Part(q, config.QUERY_ROWS, True), Part(k, own, True), Part(v, own, powers=True, keyed=True)]
        time_ms = milliseconds(lambda *parts: quantise_blocks(parts), [parts])
        speed = 9 * q.numel() / time_ms / 1e6
        row = {"head_dim": head_dim, "blocks": [config.QUERY_ROWS, own, own], "median_ms": round(time_ms, 5)}
        rows.append(row | {"GBps": round(speed, 1), "of_copy": round(speed / rate, 3), "streamed": streamed.takes(parts)})
        say(f"d{head_dim}, Q, K and V in one launch: {speed / rate:.3f} of a copy")
    return rows


def end_to_end(say: Callable[[str], None]) -> list[dict]:
    """A row for each length, mask and way."""
    rows = []
    for seqlen in LENGTHS:
        shape = (TOKENS // seqlen, seqlen, HEADS, HIDDEN // HEADS)
        sets = [tuple(torch.randn(shape, device="cuda").bfloat16() for _ in range(3)) for _ in range(2)]
        for causal in (False, True):
            for name, way in WAYS.items():
                time_ms = milliseconds(lambda q, k, v, way=way, causal=causal: way(q, k, v, causal), sets)
                rows.append({"seqlen": seqlen, "causal": causal, "what": name, "median_ms": round(time_ms, 5)})
                say(f"{seqlen} {'causal' if causal else 'full'}, {name}: {time_ms:.4f} ms")
    return rows


def record(say: Callable[[str], None]) -> dict:
    """All rows and where they come from."""
    rate = 4 * COPIED / milliseconds(torch.Tensor.copy_, [[torch.randn(COPIED, device="cuda").half() for _ in range(2)]]) / 1e6
    say(f"a copy: {rate:.0f} GB/s")
    root = config.HERE.parents[2]
    files = (Path(__file__), config.HERE / "quantise.cu", config.HERE / "quantise.py")
    packages = {name: importlib.metadata.version(name) for name in ("torch", "cuda-bindings", "nvidia-cuda-nvrtc")}
    return {
        "schema": "fasim.fp8-quantiser/3",
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "packages": packages,
        "protocol": {
            "shape": [BATCH, ROWS, HIDDEN],
            "dtype": "bf16",
            "calls": CALLS * BURSTS,
            "rest_s": REST_S,
            "statistic": "median",
            "end_to_end": {"tokens": TOKENS, "heads": HEADS, "head_dim": HIDDEN // HEADS},
        },
        "sources": {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        "copy_GBps": round(rate, 1),
        "rows": quantisers(say, rate),
        "of_a_call": of_a_call(say, rate),
        "end_to_end": end_to_end(say),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m fasim.kernels.measure.quantiser", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    found = record(lambda line: sys.stderr.write(line + "\n"))
    (out / "fp8_quantiser.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
