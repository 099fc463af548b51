"""`fasim accuracy`: the paper's table of numerical errors, on a GPU or emulated."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from .. import output
from ..options import Json


def accuracy(
    *,
    seqlen: int = 2048,
    head_dim: Annotated[int, Parameter(name="--head-dim")] = 128,
    queries: int = 128,
    heads: int = 2,
    seed: int = 0,
    device: str = "cpu",
    json: Json = False,
) -> int:
    """Show the error of attention in fp16 and FP8, the paper's column beside it.

    FlashAttention-3's Table 3: the RMSE of O on N(0, 1) + N(0, 100) Bernoulli(0.001), with one scale a tensor, block scales,
    incoherent processing, and sums in two levels. On the CPU FP8 is emulated: the arithmetic of our kernel, its tensor cores
    bit by bit. With --device cuda our kernels run. The paper names no sizes: with 8192 keys of head dim 128 every row is
    within a tenth of its figures, over 32 heads on an H200.

    Example: fasim accuracy --seqlen 512 --heads 1

    Theory: an outlier in Q or K makes one score wrong, and one wrong score is a wrong row of O. Signs and a Hadamard transform
    spread it over the head, where Q K^T is the same and the error small.

    Parameters
    ----------
    seqlen
        Keys.
    head_dim
        64, 128 or 256.
    queries
        Rows of O that are looked at.
    heads
        Draws. Outliers are few, so one differs from the next by a tenth or two.
    seed
        Of the draws.
    device
        cuda (an H100 or H200), or cpu.
    """
    try:
        from ...kernels.fp8 import error_table
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "torch":
            raise
        output.note("fasim: accuracy needs torch, which is not installed: pip install 'fasim[kernels]'")
        return 3
    from ...kernels.measure.runs import require_gpu
    from ...kernels.validation.check import MissingTool
    from ..tables import house_table

    try:
        if device == "cuda":
            require_gpu()
        with output.progress("measuring" if device == "cuda" else "emulating") as advance:
            rows = error_table.table(seqlen, head_dim, queries, heads, seed, device, advance)
    except MissingTool as error:
        output.note(f"fasim: {error}")
        return 3
    if json:
        sizes = {"seqlen": seqlen, "head_dim": head_dim, "queries": queries, "heads": heads, "seed": seed}
        output.emit_json({"device": error_table.named(device), **sizes, "rows": rows})
        return 0
    table = house_table(f"RMSE of O, {error_table.named(device)}", ">here", ">of one draw", ">paper")
    for row in rows:
        paper = "" if row["paper"] is None else f"{row['paper']:.1e}"
        table.add_row(row["method"], f"{row['rmse']:.1e}", f"{row['least']:.1e} to {row['most']:.1e}", paper)
    output.stdout().print(table)
    return 0
