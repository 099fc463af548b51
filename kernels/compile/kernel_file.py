"""One compiled kernel, asked for as FILE or FILE:NAME, as a CUDA or Gluon kernel of ours, or as one whose profile is kept."""

from __future__ import annotations

from pathlib import Path

from ...simulator.code import loop_reader, profiles, sass
from ...simulator.code.pipeline import Pipeline
from ...simulator.errors import UsageError
from ...simulator.problem.workload import Workload
from ...simulator.values import shown
from ..cuda.config import DTYPES, HEAD_DIMS, available, config_for
from ..cuda.fp8 import config as fp8
from ..gluon import config as gluon
from . import disassemble
from .build import MissingCompiler, Source, build

_SHOWN = 3


def pipeline_of(asked: str, workload: Workload) -> Pipeline:
    """The main loop of the kernel asked for: of ours (fa3, gluon-fa3), or of a profile, the variant of this workload; of a file
    the one with NAME in its name and a loop over K and V.

    Raises UsageError, one sentence, where there is none, more than one, or its loop cannot be read; MissingDisassembler.
    """
    if asked in profiles.names():
        return _kept(asked, workload)
    if asked in available():
        try:
            source = source_of(asked, workload.dtype, workload.head_dim, workload.causal, workload.seqlen_k)
            return loop_reader.read(disassemble.of_cubin(build(source).cubin)[0])
        except MissingCompiler:
            return _kept(profiles.OURS, workload, asked)
    if asked in gluon.NAMES:
        return loop_reader.read(disassemble.of_cubin(_of_gluon(asked, workload))[0])
    return loop_reader.read(_in_file(asked))


def source_of(schedule: str, dtype: str, head_dim: int, causal: bool, seqlen_k: int = 8448) -> Source:
    """The source of a variant of ours; UsageError where there is none."""
    if dtype == "e4m3":
        return fp8.config_for(schedule, "bf16", head_dim, causal, seqlen_k).source
    for name, value, possible in (("dtype", dtype, (*DTYPES, "e4m3")), ("head_dim", head_dim, HEAD_DIMS)):
        if value not in possible:
            raise UsageError(f"{name}={shown(value)} is not supported by our CUDA kernels ({', '.join(map(str, possible))})")
    return config_for(schedule, dtype, head_dim, causal).source


def _of_gluon(asked: str, workload: Workload) -> bytes:
    """A rung of kernels/gluon, compiled by the Triton that is installed; UsageError where there is none for this workload."""
    from ..gluon.build import build as build_gluon  # Triton takes a second to import

    for name, value, possible in (("dtype", workload.dtype, gluon.DTYPES), ("head_dim", workload.head_dim, gluon.HEAD_DIMS)):
        if value not in possible:
            raise UsageError(f"{name}={shown(value)} is not supported by our Gluon kernels ({', '.join(map(str, possible))})")
    schedule = asked.removeprefix(gluon.PREFIX)
    return build_gluon(gluon.config_for(schedule, workload.dtype, workload.head_dim, workload.causal, workload.seqlen_k)).cubin


def _kept(file: str, workload: Workload, schedule: str | None = None) -> Pipeline:
    """From a file of profiles, the variant that covers most keys a block and shares loads where CTAs may share."""
    there = [each for each in profiles.load(file) if schedule in (None, each.schedule)]
    asked = (workload.head_dim, workload.element_bytes, workload.causal)
    fits = [each.pipeline for each in there if (each.head_dim, each.pipeline.element_bytes, each.causal) == asked]
    if not fits:
        dims = ", ".join(map(str, sorted({each.head_dim for each in there})))
        raise UsageError(f"{file} has no kernel for {workload}: there are head dims {dims}")
    return max(fits, key=lambda each: each.multicast)


def _in_file(asked: str) -> sass.Code:
    file, _, name = (asked, "", "") if Path(asked).is_file() else asked.rpartition(":")
    found = disassemble.kernels_of(Path(file or asked), name or None)
    loops = [code for code in found if loop_reader.is_attention(code)]
    if len(loops) > 1:
        names = ", ".join(code.name for code in loops[:_SHOWN]) + (", .." if len(loops) > _SHOWN else "")
        raise UsageError(f"{file or asked} has {len(loops)} kernels that look like attention: name one as FILE:NAME ({names})")
    return (loops or found)[0]
