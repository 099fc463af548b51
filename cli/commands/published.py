"""`fasim published`: the papers' tables beside the predictions."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from .. import output
from ..options import Json


def published(
    *,
    figure: Annotated[str | None, Parameter(name="--figure")] = None,
    json: Json = False,
) -> None:
    """Set the papers' tables beside the predictions.

    For every published bar, forward or backward, whose implementation has a schedule here: the bar, the prediction, the raw error;
    per group the mean absolute error (MAPE), the "implementation efficiency" (geometric mean of published over
    predicted) and the error that is left after that one factor.

    Example: fasim published --figure ablation

    Theory: the papers' bars are kernels of their year. A model of the schedule overshoots them by what the kernel of
    that year left on the table; a good model overshoots evenly, so the error after one factor is the telling one.

    Parameters
    ----------
    figure
        A figure or panel (5, 5c; fa2-5c or fa3-5c where both papers have one), ablation, h200 or hbm. Without it: all.
    """
    from ...traces import hbm as figure_2
    from ...traces import published as book
    from ...traces.predictions import processes
    from .. import published_tables as render

    wants_hbm = figure is None or figure.lower() == "hbm"
    with output.progress("predicting") as advance:
        report = None if figure and wants_hbm else book.report(figure, advance=advance, processes=processes())
        hbm = figure_2.hbm_report(advance=advance) if wants_hbm else None
    if json:
        output.emit_json(render.plain(report, hbm))
        return
    console = output.stdout()
    for part in render.report(report) if report else ():
        console.print(part)
    for part in render.hbm(hbm) if hbm else ():
        console.print(part)
