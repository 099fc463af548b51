"""The schedules: one file each, siblings without shared flags. Read two side by side and the difference is the idea."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..code.compiled import code_of
from ..code.estimate import COMBINE, FEW_ROWS, OURS, PLAIN, PYTORCH, SHIPPED, Estimate
from ..code.pipeline import Pipeline
from ..errors import UsageError, did_you_mean
from ..problem.order import SECTION_BYTES, SHIPPED_SECTION_BYTES
from ..problem.workload import DIRECTIONS
from . import own
from .backward import ALL as _ALL_BACKWARD
from .compiled_kernel import body_of, tile_of
from .forward.decode import combine, walk_part
from .forward.fa1 import fa1
from .forward.fa1_published import fa1_published
from .forward.fa2 import fa2
from .forward.fa3 import fa3
from .forward.overlap_2stage import overlap_2stage
from .forward.overlap_3stage import overlap_3stage
from .forward.pingpong import pingpong
from .forward.published import fa3_published, pingpong_published, warp_specialized_published
from .forward.standard import scores, softmax_three_pass, values
from .forward.standard_online import softmax_online
from .forward.warp_specialized import warp_specialized
from .kernel import Kernel, Schedule

__all__ = ["BACKWARD", "SCHEDULES", "Kernel", "Schedule", "adopt", "find_schedule", "is_compiled"]

def _rows(body: Callable, code: Estimate, section_bytes: int = SECTION_BYTES) -> Kernel:
    return Kernel(body, "rows", persistent=code.persistent, descending=True, code=code, section_bytes=section_bytes)


def _published(name: str, body: Callable, section: str) -> Schedule:
    return Schedule(
        f"{name}-published",
        f"{name} as FlashAttention-3 ships it: online softmax, its tiles, O staged over V",
        f"FlashAttention-3 (arXiv:2407.08608) {section}, and its source",
        "published",
        (_rows(body, SHIPPED, SHIPPED_SECTION_BYTES),),
        dtypes=_HOPPER_DTYPES,
    )


_HOPPER_DTYPES = ("fp16", "bf16", "e4m3")
_ALL = (
    Schedule(
        "standard",
        "three kernels; S and P go through HBM; three-pass softmax",
        "FlashAttention (arXiv:2205.14135) Algorithm 0",
        "standard",
        (
            Kernel(scores, "tiles", skips_masked=False),
            Kernel(softmax_three_pass, "rows", frozenset({"S", "P"}), skips_masked=False, by_row=True),
            Kernel(values, "rows", frozenset({"P", "V"}), skips_masked=False),
        ),
    ),
    Schedule(
        "standard-online",
        "three kernels; S and P go through HBM; online softmax",
        "FlashAttention (arXiv:2205.14135) Algorithm 0, with arXiv:1805.02867",
        "standard",
        (
            Kernel(scores, "tiles", skips_masked=False),
            Kernel(softmax_online, "rows", frozenset({"S", "P"}), skips_masked=False, by_row=True),
            Kernel(values, "rows", frozenset({"P", "V"}), skips_masked=False),
        ),
    ),
    Schedule(
        "fa1",
        "K/V outer loop; Q, O, l and m travel at every step",
        "FlashAttention (arXiv:2205.14135) Algorithm 1",
        "fa1",
        (Kernel(fa1, "heads", frozenset({"Q", "O", "l", "m"})),),
    ),
    Schedule(
        "fa1-published",
        "fa1 as shipped: a head's Q blocks are dealt to as many CTAs as fill the SMs, the next Q is loaded under the softmax",
        "FlashAttention (arXiv:2205.14135) Algorithm 1, and the source of its later kernels (1.0.9)",
        "fa1",
        (Kernel(fa1_published, "heads", frozenset({"Q", "O", "l", "m"}), fills=True),),
    ),
    Schedule(
        "fa2",
        "Q outer loop, O stays in registers; cp.async and mma.sync",
        "FlashAttention-2 (arXiv:2307.08691) Algorithm 1",
        "mma",
        (_rows(fa2, PLAIN),),
    ),
    Schedule(
        "fa2-pytorch",
        "fa2 as PyTorch ships it: compiled without fast math, products and sums apart, exponentials that keep denormals",
        "FlashAttention-2 (arXiv:2307.08691) Algorithm 1, and the library of torch 2.11",
        "mma",
        (_rows(fa2, PYTORCH),),
    ),
    Schedule(
        "decode",
        "few queries: the heads of a group as rows of one tile, its keys in parts, a combine; cp.async and mma.sync",
        "Flash-Decoding (FlashAttention's repository), FlashAttention-2 (arXiv:2307.08691) section 3.1",
        "decode",
        (
            Kernel(walk_part, "parts", code=FEW_ROWS),
            Kernel(combine, "combine", frozenset({"Opart", "LSEpart"}), code=COMBINE, early=True),
        ),
    ),
    Schedule(
        "warp-specialized",
        "a producer warp loads by TMA, free-running consumer warpgroups compute by WGMMA",
        "FlashAttention-3 (arXiv:2407.08608) section 3.1, Algorithm 1",
        "in sequence",
        (_rows(warp_specialized, OURS),),
        dtypes=_HOPPER_DTYPES,
    ),
    Schedule(
        "pingpong",
        "one warpgroup's softmax hides under the other's GEMMs, by named barriers",
        "FlashAttention-3 (arXiv:2407.08608) section 3.1",
        "in sequence",
        (_rows(pingpong, OURS),),
        dtypes=_HOPPER_DTYPES,
    ),
    Schedule(
        "overlap-2stage",
        "a warpgroup's softmax runs under its own PV of the block before",
        "FlashAttention-3 (arXiv:2407.08608) section 3.2, Algorithm 2",
        "hopper",
        (_rows(overlap_2stage, OURS),),
        dtypes=_HOPPER_DTYPES,
    ),
    Schedule(
        "overlap-3stage",
        "softmax under both the PV before and the QK^T after; two score blocks live",
        "FlashAttention-3 (arXiv:2407.08608) appendix B.3",
        "3-stage",
        (_rows(overlap_3stage, OURS),),
        scores_live=2,
        dtypes=_HOPPER_DTYPES,
    ),
    Schedule(
        "fa3",
        "pingpong between warpgroups and two-stage overlap within each",
        "FlashAttention-3 (arXiv:2407.08608) sections 3.1 and 3.2",
        "hopper",
        (_rows(fa3, OURS),),
        dtypes=_HOPPER_DTYPES,
    ),
    _published("warp-specialized", warp_specialized_published, "section 3.1"),
    _published("pingpong", pingpong_published, "section 3.1"),
    _published("fa3", fa3_published, "sections 3.1 and 3.2"),
)
SCHEDULES: dict[str, Schedule] = {schedule.name: schedule for schedule in _ALL}
BACKWARD: dict[str, Schedule] = {schedule.name: schedule for schedule in _ALL_BACKWARD}
_OF = dict(zip(DIRECTIONS, (SCHEDULES, BACKWARD), strict=True))


def adopt(name: str, pipeline: Pipeline, order: str | None = None) -> Schedule:
    """The schedule of a compiled kernel, which `find_schedule` knows by this name from now on.

    Its order is the kernel's own, or that of the schedule `order`. Raises UsageError where its tile cannot be read, or where the
    schedule has other kernels than one with TMA and WGMMA.
    """
    section = SHIPPED_SECTION_BYTES if pipeline.meets else SECTION_BYTES
    kernel = _rows(body_of(pipeline), code_of(pipeline), section)
    kernel = replace(kernel, plain=pipeline.loads == "cp_async", strides=pipeline.persistent and not pipeline.draws)
    kernel = replace(kernel, registers=pipeline.registers)
    family = "mma" if pipeline.synchronous else "hopper"
    base = Schedule(name, "order and code of a compiled kernel", name, family, (kernel,))
    if order:
        base = find_schedule(order)
        if not base.hopper or pipeline.synchronous:
            which = f"has no WGMMA, and {name} has: give --schedule fa3, or"
            which = f"is for WGMMA, and {name} has none:" if base.hopper else which
            raise UsageError(f"'{order}' {which} leave it out")
        kernel = replace(base.kernels[0], code=code_of(pipeline, lent=True), persistent=pipeline.persistent)
        kernel = replace(kernel, strides=pipeline.persistent and not pipeline.draws)
        base = replace(base, summary=f"{order} with the code of a compiled kernel", kernels=(kernel,))
    dtypes = ("fp16", "bf16") if pipeline.element_bytes == 2 else ("e4m3",)
    base = replace(base, name=name, dtypes=dtypes, tile=tile_of(pipeline, name), head_dims=(pipeline.head_dim,))
    _COMPILED[name] = base
    return base


_COMPILED: dict[str, Schedule] = {}


def is_compiled(name: str) -> bool:
    """Whether a schedule's name is that of a compiled kernel, of this process alone."""
    return name in _COMPILED


def find_schedule(name: str, direction: str = "forward") -> Schedule:
    """The schedule of that name, or the user's own of a name such as ./mine.py:my_schedule, whose file is run.

    Raises UsageError naming those there are, or what is wrong with the file, and at which line.
    """
    if own.is_own(name):
        if direction != "forward":
            raise UsageError(f"{name}: a schedule of your own is a forward one; the backward has {', '.join(BACKWARD)}")
        body, where = own.load(name)
        kernel = _rows(body, OURS)
        return Schedule(name, "your own", where, "hopper", (replace(kernel, where=where),), dtypes=_HOPPER_DTYPES)
    if name in _COMPILED:
        return _COMPILED[name]
    known = _OF[direction]
    if name in known:
        return known[name]
    for other, there in _OF.items():
        if name in there:
            raise UsageError(f"schedule {name!r} is of the {other}; the {direction} has {', '.join(known)}")
    listed = ", ".join(known) + (", or your own as ./mine.py:my_schedule" if direction == "forward" else "")
    raise UsageError(f"schedule {name!r} is not known ({listed}){did_you_mean(name, known)}")
