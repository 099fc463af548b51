"""`fasim inspect`: what a compiled kernel is, read from its machine code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from .. import output
from ..options import Json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ...kernels.compile.inspect import Inspection


def inspect(
    file: str,
    /,
    *,
    kernel: str | None = None,
    head_dim: int = 128,
    dtype: str = "fp16",
    causal: Annotated[bool, Parameter(name="--causal", negative=())] = False,
    whole: Annotated[bool, Parameter(name="--whole", negative=(), show_default=False)] = False,
    json: Json = False,
) -> int:
    """Show what a compiled kernel is: its loops, what stands in them in order, and what looks wrong.

    FILE is a .cubin, a library (.so) or object with machine code for a Hopper in it, a .ptx or the name of a CUDA kernel of ours,
    which are compiled first. Only text is read, nothing of the file runs, and no GPU is needed. Exit status: 2 for a file without
    a kernel, 3 where no disassembler is installed.

    Example: fasim inspect fa3 --head-dim 128 --causal

    Theory: the compiler writes into each instruction how many cycles the warp stalls behind it. So a loop's least cycles, its
    exponentials and the order of its waits, GEMMs and barriers can be read before anything runs. Counts are of a loop's
    usual way: the shortest that passes every wait, GEMM and barrier, so without a mask or another try of a softmax.

    Parameters
    ----------
    file
        The file, or a kernel of ours.
    kernel
        Only kernels with this in their name.
    head_dim
        Of a kernel of ours: 64, 128 or 256.
    dtype
        Of a kernel of ours: fp16, bf16 or e4m3.
    causal
        Of a kernel of ours: the variant with a causal mask.
    whole
        Print each loop part by part, with the instructions between two points.
    """
    from ...kernels.compile import disassemble
    from ...kernels.compile.build import MissingCompiler, build
    from ...kernels.compile.inspect import inspect as read
    from ...kernels.compile.kernel_file import source_of
    from ...kernels.cuda.config import available

    try:
        if file in available():
            found = disassemble.of_cubin(build(source_of(file, dtype, head_dim, causal)).cubin)
        else:
            found = disassemble.kernels_of(Path(file), kernel)
    except (MissingCompiler, disassemble.MissingDisassembler) as error:
        output.note(f"fasim: {error}")
        return 3
    read_kernels = [read(code) for code in found]
    if json:
        output.emit_json([each.to_dict() for each in read_kernels])
    else:
        for each in read_kernels:
            output.stdout().print(_shown(each, whole))
    return 0


def _shown(found: Inspection, whole: bool) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    launch = f"{found.threads} threads, " if found.threads else ""
    launch += f"{found.registers} registers a thread, " if found.registers else ""
    said = f"{launch}{found.instructions:,} instructions; {'; '.join(found.means) or 'no GEMM'}"
    read = f"reads as: {found.reads_as}" if found.reads_as else f"order not read: {found.not_read}"
    lines = [Text(found.kernel, "bold"), Text(said), Text(read)]
    for number, turn in enumerate(found.turns, start=1):
        per_score = f"{turn.per_score:.2f} a score" if turn.per_score else "no scores"
        skipped = f" of the {turn.standing} that stand in it" if turn.standing > turn.instructions else ""
        lines.append(Text(f"\nloop {number}: {turn.instructions} instructions{skipped}, {per_score}"))
        lines.append(Text(f"  GEMMs       {'; '.join(turn.gemms)}"))
        lines.append(Text(f"  between     {', '.join(f'{count} {pipe}' for pipe, count in turn.pipes.items())}"))
        lines.append(Text(f"  one warp    stalls {turn.stalls:,} cycles between the points, MUFU {turn.mufu_cycles:,} cycles"))
        lines.append(Text(f"  order       {' > '.join(turn.order)}"))
        if whole:
            lines += [Text(f"    {part}") for part in turn.parts]
    lines += [Text(f"\nlooks wrong: {remark}", "yellow") for remark in found.remarks]
    return Group(*lines, Text(""))
