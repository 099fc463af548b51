"""One kernel that is asked for as FILE or FILE:NAME, or by the name of a CUDA kernel of ours, as its machine code."""

from __future__ import annotations

from pathlib import Path

from ...simulator.code import sass
from ...simulator.errors import UsageError
from ...simulator.problem.workload import Workload
from ..cuda.config import available, config_for
from . import disassemble
from .build import build

_SHOWN = 3


def find(asked: str, workload: Workload) -> sass.Code:
    """The kernel asked for: of ours the variant of this workload, of a file the one with NAME in its name and a loop over K and V.

    Raises UsageError where there is none or more than one, MissingCompiler and MissingDisassembler.
    """
    if asked in available():
        config = config_for(asked, workload.dtype, workload.head_dim, workload.causal)
        return disassemble.of_cubin(build(config.source).cubin)[0]
    file, _, name = (asked, "", "") if Path(asked).is_file() else asked.rpartition(":")
    found = disassemble.kernels_of(Path(file or asked), name or None)
    loops = [code for code in found if any(loop.scores for loop in sass.loops(code))]
    if len(loops) > 1:
        names = ", ".join(code.name for code in loops[:_SHOWN]) + (", .." if len(loops) > _SHOWN else "")
        raise UsageError(f"{file or asked} has {len(loops)} kernels with S = Q K^T by WGMMA: name one as FILE:NAME ({names})")
    return (loops or found)[0]
