"""`fasim kernels`: the CUDA kernels and whether each is compiled."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from .. import output
from ..options import Json


def kernels(
    *,
    build: Annotated[bool, Parameter(name="--compile", negative=(), show_default=False)] = False,
    json: Json = False,
) -> int:
    """List the CUDA kernels: tile, registers, spills, shared memory, and whether each is compiled.

    Needs no GPU. Kernels are compiled by NVRTC on first use and kept in FASIM_CACHE_DIR (default: ~/.cache/fasim).
    Exit status: 0 good, 1 a kernel does not compile, 3 NVRTC is needed and not installed.

    Example: fasim kernels --compile

    Theory: registers and shared memory decide the tile. An SM has 65,536 registers for one CTA of these kernels; setmaxnreg
    takes them from the producer warpgroup and gives them to the consumers, which hold S, P and O.

    Parameters
    ----------
    build
        Compile what is not in the cache, on all cores.
    """
    from ...kernels.compile.build import MissingCompiler
    from ...kernels.cuda import catalog

    try:
        with output.progress("compiling") as advance:
            found = catalog.entries(compiled=build, advance=advance)
    except MissingCompiler as error:
        output.note(f"fasim: {error}")
        return 3
    if json:
        output.emit_json([entry.to_dict() for entry in found])
    else:
        from .. import kernels as render

        output.stdout().print(render.listing(found))
    if catalog.missing():
        output.note(f"no CUDA kernel yet: {', '.join(catalog.missing())}")
    return 1 if any(entry.error for entry in found) else 0
