"""The few instructions of PTX that the kernels say inline, on numpy, for gluon_language.py and for Triton's interpreter."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from gluon_machine import TYPES

WARP = 32


def _by_thread(values: np.ndarray) -> np.ndarray:
    """(threads, elements) of a (rows, groups, 4 lanes[, 2]) tensor, as an accumulator lies: a thread has two of a warp's rows."""
    rows, groups, lanes = values.shape[:3]
    apart = values.reshape(rows // 16, 2, 8, groups, lanes, -1)  # warp, half, row, group, lane, pair
    return apart.transpose(0, 2, 4, 3, 1, 5).reshape(rows // 16 * WARP, -1)


def _by_row(elements: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    rows, groups, lanes = shape[:3]
    apart = elements.reshape(rows // 16, 8, lanes, groups, 2, -1)
    return apart.transpose(0, 4, 1, 3, 2, 5).reshape(shape)


def _pair(convert: str, upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Two fp32 as one word of two 16-bit numbers."""
    kind = TYPES["bf16" if ".bf16x2." in convert else "fp16"]
    upper, lower = (kind.bits_of(kind.rounded(each)).astype(np.uint32) for each in (upper, lower))
    return upper << 16 | lower


def run(text: str, constraints: str, given: Sequence[np.ndarray], pack: int) -> list[np.ndarray]:
    """What the text makes of the operands; results that a register holds as bits are int32."""
    kinds = [each[1:] for each in constraints.split(",") if each.startswith("=")]
    assert len(constraints.split(",")) == len(kinds) + pack * len(given)
    if at := re.fullmatch(r"(cvt\.rn\.\w+\.f32) \$0, \$(\d), \$(\d);", text):
        return [_pair(at[1], *(given[int(place) - 1] for place in at.groups()[1:])).view(np.int32)]
    if text == "mov.b32 {$0, $1}, $2;":
        bits = np.ascontiguousarray(given[0]).view(np.uint32)
        return [(half & 0xFFFF).astype(np.uint16) for half in (bits, bits >> 16)]
    shape = given[0].shape
    bits = [each if each.dtype == np.int32 else each.astype(np.float32) for each in given]
    inputs = [_by_thread(np.ascontiguousarray(np.broadcast_to(each, shape)).view(np.float32)) for each in bits]
    assert inputs[0].shape[1] == pack, "one text for all that a thread holds"
    with np.errstate(all="ignore"):
        cells = _executed(text, inputs, len(kinds))
    results = []
    for first in range(0, len(kinds), pack):
        made = _by_row(np.stack([cells[f"${first + i}"] for i in range(pack)], 1), shape)
        results.append(np.ascontiguousarray(made).view(np.int32) if kinds[first] == "r" else made)
    return results


def _executed(text: str, inputs: Sequence[np.ndarray], results: int) -> dict[str, np.ndarray]:
    """Every register at the end, by its name; threads that branch skip to the label."""
    threads, pack = inputs[0].shape
    cells = {f"${i}": np.full(threads, np.nan, np.float32) for i in range(results)}
    for number, each in enumerate(inputs):
        cells |= {f"${results + pack * number + i}": each[:, i].copy() for i in range(pack)}
    active = np.ones(threads, bool)

    def value(name: str) -> np.ndarray:
        if name.startswith("0f"):
            return np.full(threads, np.array(int(name[2:], 16), np.uint32).view(np.float32))
        return cells[name]

    for said in filter(None, (each.strip() for each in re.split(r"[;{}]|(?<=:)", text))):
        name, _, rest = said.partition(" ")
        to, *names = re.split(r", *", rest)
        if name == ".reg":
            continue
        if said == "DONE:":
            active[:] = True
            continue
        if name == "@p":
            assert rest == "bra DONE"
            active &= ~cells["p"]
            continue
        if name.startswith("vote"):
            assert active.all()
            made = np.repeat(cells[names[0]].reshape(-1, WARP).all(1), WARP)
        elif name.startswith("shfl.sync.bfly"):
            made = value(names[0])[np.arange(threads) ^ int(names[1])]
        elif name.startswith("cvt"):
            made = _pair(name, *map(value, names)).view(np.float32)
        elif name.startswith("selp"):
            made = np.where(cells[names[2]], value(names[0]), value(names[1]))
        elif name.startswith("setp"):
            a, b = map(value, names[:2])
            made = a <= b if ".le." in name else a == b
            made &= cells[names[2]] if ".and." in name else True
        else:
            made = DO[name.split(".")[0]](*map(value, names))
        cells[to] = np.where(active, made, cells.get(to, made))
    return cells


DO = {
    "mov": lambda a: a,
    "neg": lambda a: -a,
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "max": np.fmax,
    "fma": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
    "ex2": np.exp2,
}
