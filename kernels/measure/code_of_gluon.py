"""What a block costs a warp in instructions, read from machine code: `python -m fasim.kernels.measure.code_of_gluon --out FILE`.

The rungs in Gluon as the installed Triton compiles them, our CUDA kernel, and, with --library, FlashAttention-3's wheel. Of each
the main loop without a mask, on its usual way (simulator/code/way.py), for 64 rows and 128 keys: 64 scores a thread. No GPU
is needed. Rows are added to FILE; those of the same kernel and compiler are replaced.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ...simulator.code import sass, way
from ...simulator.reading import read_json
from ..compile import build as nvrtc
from ..compile import disassemble
from ..cuda.config import config_for
from ..gluon import build
from ..gluon import config as gluon

GROUPS = {
    "GEMMs": ("HGMMA",),
    "exponentials": ("MUFU",),
    "multiply and add": ("FFMA", "FMUL", "FADD", "HFMA2", "FFMA2"),
    "maxima": ("FMNMX", "FMNMX3", "SHFL", "FSETP", "FSEL"),
    "conversions": ("F2FP", "F2F", "PRMT"),
    "register moves": ("MOV", "CS2R", "SEL"),
    "hand-overs and waits": ("SYNCS", "BAR", "WARPGROUP", "WARPSYNC", "BSSY", "BSYNC", "DEPBAR", "WARPGROUPDEPBAR", "NOP", "VOTE"),
    "branches": ("BRA", "ISETP", "UISETP", "PLOP3", "UPLOP3"),
}
ADDRESSES = "descriptors and addresses"
"""All else: whole numbers and uniform registers."""
SCORES = 64


def group_of(each: sass.Instruction) -> str:
    """Which of GROUPS an instruction is of."""
    if each.name == "IMAD" and ".MOV" in each.opcode:
        return "register moves"
    return next((group for group, names in GROUPS.items() if each.name in names), ADDRESSES)


def row_of(kernel: str, compiler: str, head_dim: int, causal: bool, code: sass.Code) -> dict:
    """Instructions by group, and the cycles that the compiler has a lone warp wait to issue them, per 64 scores of a thread."""
    loops = [loop for loop in sass.loops(code) if loop.scores]
    taken = min(loops, key=lambda loop: len(way.usual(code, loop)) / loop.scores)
    numbers = way.usual(code, taken)
    share = SCORES / taken.scores
    counts = Counter(group_of(code.instructions[number]) for number in numbers)
    stalls = sum(part.stalls for part in sass.parts(code, numbers) if isinstance(part, sass.Segment))
    opcodes = Counter(code.instructions[number].name for number in numbers)
    return {
        "kernel": kernel, "compiler": compiler, "head_dim": head_dim, "causal": causal, "scores": taken.scores,
        "instructions": round(len(numbers) * share, 1), "stalls": round(stalls * share, 1),
        "groups": {group: round(counts[group] * share, 1) for group in (*GROUPS, ADDRESSES)},
        "barriers": round(opcodes["BAR"] * share, 1), "mbarriers": round(opcodes["SYNCS"] * share, 1),
        "local": sum(opcodes[name] for name in ("LDL", "STL")),
    }  # fmt: skip


def rows(head_dims: list[int], library: Path | None, names: dict[tuple[int, bool], str]) -> Iterator[dict]:
    """A row for each kernel, bf16."""
    for head_dim in head_dims:
        for causal in (False, True):
            for schedule in gluon.SCHEDULES:
                config = gluon.config_for(schedule, "bf16", head_dim, causal, gluon.BLOCK_N[head_dim])
                built = build.build(config)
                (code,) = disassemble.of_cubin(built.cubin)
                yield row_of(gluon.PREFIX + schedule, built.compiler, head_dim, causal, code)
            (code,) = disassemble.of_cubin(nvrtc.build(config_for("fa3", "bf16", head_dim, causal).source).cubin)
            yield row_of("fa3", f"NVRTC {nvrtc.compiler_version()}", head_dim, causal, code)
            if library and (head_dim, causal) in names:
                (code, *_) = disassemble.kernels_of(library, names[head_dim, causal])
                yield row_of("peer:fa3", "as shipped", head_dim, causal, code)


def names_of_peer() -> dict[tuple[int, bool], str]:
    """(head dim, causal) -> the kernel's name in FlashAttention-3's wheel, as its profiles have it."""
    from ...simulator.code import profiles

    path = Path(profiles.__file__).with_name("fa3-fwd-0.0.3.json")
    read = read_json(path, "profiles")["profiles"]
    found: dict[tuple[int, bool], str] = {}
    for each in read:
        if each["dtype"] == "bf16":
            found.setdefault((each["head_dim"], each["causal"]), each["kernel"])
    return found


def main() -> None:
    """Read all, add to FILE."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a JSON file, new or with rows of another compiler")
    parser.add_argument("--head-dims", nargs="+", type=int, choices=gluon.HEAD_DIMS, default=[128])
    parser.add_argument("--library", type=Path, help="FlashAttention-3's _C.abi3.so, to read its kernels too")
    given = parser.parse_args()
    old = read_json(given.out, "rows")["rows"] if given.out.exists() else []
    new = list(rows(given.head_dims, given.library, names_of_peer()))
    key = lambda row: (row["kernel"], row["compiler"], row["head_dim"], row["causal"])  # noqa: E731
    kept = {key(row): row for row in [*old, *new]}
    result = {
        "schema": "fasim.code-beside/1",
        "date": datetime.date.today().isoformat(),
        "source": "kernels/measure/code_of_gluon.py",
        "what": "instructions of a warp for 64 rows and 128 keys of the main loop without a mask, on its usual way",
        "rows": sorted(kept.values(), key=lambda row: (row["head_dim"], row["causal"])),
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in new:
        said = ", ".join(f"{count:g} {group}" for group, count in row["groups"].items())
        head = f"{row['kernel']:22} d{row['head_dim']} {row['instructions']:g} instructions, {row['stalls']:g} cycles"
        sys.stdout.write(f"{head}: {said}\n")


if __name__ == "__main__":
    main()
