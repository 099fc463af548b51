"""FP8 kernels whose V comes as rows of keys beside those that transpose it: `python -m fasim.kernels.measure.keyed_fp8 --out DIR`.

First whether both give the same bits, O and LSE, at shapes with ragged ends, masks and grouped heads; then, of 16k tokens and
hidden size 2048, the kernels alone, and from bf16 to O with the quantisers: one launch for Q, K and V, or one for Q and K and one
that writes V across. Medians between CUDA events in bursts (quantiser.py). `--seconds` is a deadline: what it leaves out is said.
Writes keyed_fp8.json after every row.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..compile import build
from ..cuda.fp8 import keyed as kernels
from ..cuda.fp8 import keyed_launch, launch
from ..cuda.fp8.config import QUERY_ROWS, config_for
from ..fp8.keyed import as_rows_of_keys, quantise_keyed
from ..fp8.plain import Part
from ..fp8.quantise import quantise_blocks
from .quantiser import milliseconds

TOKENS, HIDDEN = 16384, 2048
CHECKED = [
    # batch, queries, keys, heads, kv heads, causal
    (1, 300, 777, 2, 2, False), (2, 129, 513, 4, 2, True), (1, 1000, 1000, 4, 1, True), (1, 64, 16, 1, 1, False),
    (3, 640, 640, 12, 12, True), (1, 2048, 4100, 8, 8, False),
]  # fmt: skip
LENGTHS = ((128, 16384), (128, 4096), (128, 2048), (256, 16384), (256, 4096), (64, 16384), (64, 4096), (128, 1024))
TIMED = [
    (head_dim, seqlen, causal)
    for head_dim, seqlen in LENGTHS
    for causal in (False, True)
]
PREDICTED = {64: 0.01, 128: 0.04, 256: 0.16}
"""How much faster the model says that the kernel alone becomes (2 x 8192 tokens, full), written down before any run."""


def operands(q: Tensor, k: Tensor, v: Tensor) -> tuple[list[Tensor], Tensor]:
    """q, k and v in e4m3 with their descales, as `flash_attn_fp8` makes them with the transform, and V as rows of keys."""
    rows = config_for("fa3", "bf16", k.shape[3], False, k.shape[1]).fit.tile.block_n
    found = quantise_blocks([Part(q, QUERY_ROWS, True), Part(k, rows, True), Part(v, rows, powers=True)], 0)
    return [each for part in found for each in part[:2]], as_rows_of_keys(found[2].values)


def standing(q, q_scale, k, k_scale, v, v_scale, causal):
    """The kernels that transpose V."""
    return launch.forward(q, k, v, q_scale, k_scale, v_scale, causal=causal, block_scales=True)


def with_keys(q, q_scale, k, k_scale, v, v_scale, causal):
    """Those that need not."""
    return keyed_launch.forward(q, k, v, q_scale, k_scale, v_scale, causal=causal)


def from_bf16(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Two quantisers and the kernel without a transposition."""
    rows = config_for("fa3", "bf16", k.shape[3], False, k.shape[1]).fit.tile.block_n
    (q8, q_scale, _), (k8, k_scale, _) = quantise_blocks([Part(q, QUERY_ROWS, True), Part(k, rows, True)], 0)
    v8, v_scale = quantise_keyed(v, rows)
    return with_keys(q8, q_scale, k8, k_scale, v8, v_scale, causal)


def standing_from_bf16(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """One quantiser and the kernel that transposes V."""
    return standing(*operands_alone(q, k, v), causal)


def operands_alone(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """`operands` without the rows of keys."""
    rows = config_for("fa3", "bf16", k.shape[3], False, k.shape[1]).fit.tile.block_n
    found = quantise_blocks([Part(q, QUERY_ROWS, True), Part(k, rows, True), Part(v, rows, powers=True)], 0)
    return [each for part in found for each in part[:2]]


def drawn(batch: int, queries: int, keys: int, heads: int, kv_heads: int, head_dim: int) -> list[Tensor]:
    """bf16 q, k and v of a shape."""
    shapes = ((batch, queries, heads, head_dim), *((batch, keys, kv_heads, head_dim),) * 2)
    return [torch.randn(shape, device="cuda").bfloat16() for shape in shapes]


def checks(say: Callable[[str], None]) -> list[dict]:
    """Elements that differ between the two kernels, and between the two quantisers, for each shape."""
    rows = []
    for head_dim in (64, 128, 256):
        for batch, queries, keys, heads, kv_heads, causal in CHECKED:
            q, k, v = drawn(batch, queries, keys, heads, kv_heads, head_dim)
            given, across = operands(q, k, v)
            want, got = standing(*given, causal), with_keys(*given[:4], across, given[5], causal)
            own, scale = quantise_keyed(v, config_for("fa3", "bf16", head_dim, False, keys).fit.tile.block_n)
            row = {"head_dim": head_dim, "shape": [batch, queries, keys, heads, kv_heads], "causal": causal}
            for name, a, b in zip(("O", "LSE"), want, got, strict=True):
                row[name] = int((a.view(torch.int16) != b.view(torch.int16)).sum())
            row["V"] = int((own.view(torch.uint8) != across.view(torch.uint8)).sum()) + int((scale != given[5]).sum())
            rows.append(row)
            say(f"d{head_dim} {row['shape']}{' causal' * causal}: {row['O']} of O, {row['LSE']} of LSE, {row['V']} of V differ")
    return rows


def timed(head_dim: int, seqlen: int, causal: bool) -> dict:
    """Milliseconds of both, alone and from bf16."""
    heads = HIDDEN // head_dim
    given = [drawn(TOKENS // seqlen, seqlen, seqlen, heads, heads, head_dim) for _ in range(2)]
    sets = [operands(*each) for each in given]
    row = {"head_dim": head_dim, "seqlen": seqlen, "causal": causal}
    for _ in range(2):  # in turns, the lesser of two
        for name, call, these in (
            ("transposing", lambda *x: standing(*x, causal), [alone for alone, _ in sets]),
            ("keyed", lambda *x: with_keys(*x, causal), [(*alone[:4], across, alone[5]) for alone, across in sets]),
            ("transposing from bf16", lambda *x: standing_from_bf16(*x, causal), given),
            ("keyed from bf16", lambda *x: from_bf16(*x, causal), given),
        ):
            row[name] = min(row.get(name, 1e9), round(milliseconds(call, these), 5))
    return row | {"faster": round(row["transposing"] / row["keyed"] - 1, 4), "predicted": PREDICTED[head_dim]}


def main() -> None:
    """Check, time, write."""
    parser = argparse.ArgumentParser(prog="python -m fasim.kernels.measure.keyed_fp8", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + chosen.seconds

    def say(line: str) -> None:
        sys.stderr.write(line + "\n")

    build.build_all([kernel.source for kernel in kernels.keyed_variants()])
    found = {"schema": "fasim.keyed-fp8/1", "date": datetime.date.today().isoformat(), "device": torch.cuda.get_device_name()}
    found |= {"checks": checks(say), "rows": [], "left_out": []}
    for head_dim, seqlen, causal in TIMED:
        if time.monotonic() > until:
            found["left_out"].append([head_dim, seqlen, causal])
        else:
            found["rows"].append(timed(head_dim, seqlen, causal))
            say(str(found["rows"][-1]))
        (chosen.out / "keyed_fp8.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
