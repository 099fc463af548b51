"""A kernel's text as it was when runs were recorded, where what has come since leaves the machine code of some variants as it was.

What was measured is machine code: a run stands where its kernel's earlier text compiles to today's, byte for byte.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cache
from pathlib import Path

from ..compile import build
from ..cuda.config import KernelConfig

ROOT = Path(__file__).parents[2]
CAME = {
    "kernels/cuda/overlap_3stage.cu": (
        "// At head dim 256 both warpgroups settle in step, softmax beside softmax and GEMM beside GEMM; turns keep them half a"
        " block apart.\nconstexpr bool IN_TURNS = HEAD_DIM == 256;\n\n",
        "  if (IN_TURNS) wg.take(j);\n",
        "  if (IN_TURNS) wg.give(j);\n",
    ),
}
"""File -> the lines that have come since; without them the text is the earlier one."""


def text_of(path: str) -> str | None:
    """The earlier text of a file, or None where there is none to tell. ValueError where a line that came is not there once."""
    if path not in CAME:
        return None
    text = (ROOT / path).read_text(encoding="utf-8")
    for line in CAME[path]:
        if text.count(line) != 1:
            raise ValueError(f"{path} has {text.count(line)} places for {line.strip()!r}, not one")
        text = text.replace(line, "")
    return text


def sha256(path: str) -> str:
    """Of a file of the package as it is today; nothing where it is gone."""
    return hashlib.sha256((ROOT / path).read_bytes()).hexdigest() if (ROOT / path).exists() else ""


@cache
def stands(path: str, digest: str, config: KernelConfig) -> bool:
    """Whether the file of that SHA-256 is today's for this kernel: by its text, or, compiled both ways, by the machine code."""
    if digest == sha256(path):
        return True
    earlier = text_of(path)
    if earlier is None or config.path != ROOT / path or digest != hashlib.sha256(earlier.encode()).hexdigest():
        return False
    today, then = (build.build(source).cubin for source in (config.source, replace(config.source, text=earlier)))
    return build.machine_code(today) == build.machine_code(then)
