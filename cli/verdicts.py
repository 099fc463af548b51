"""The first lines of what a command says: which schedule, what a change does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from . import output

if TYPE_CHECKING:
    from ..simulator.results.run import Run
    from ..traces.predictions import Question
    from .options import MachineOptions


def sentences(questions: Sequence[Question], runs: Sequence[Run], machine: MachineOptions) -> list[Text]:
    """What the runs of one workload amount to, a line each; none for a single run on a device as it is."""
    from dataclasses import replace

    from ..simulator.devices.device import load_device
    from ..traces.answers import verdict
    from ..traces.predictions import predict_all

    said: list[Text] = []
    if machine.set_:
        changed = machine.changed()
        plain = [replace(question, device=load_device(machine.device)) for question in questions]
        with output.progress("predicting without the change") as advance:
            before = predict_all(plain, advance=advance)
        said += [Text(verdict.of_change(before[q], run, changed.what), "bold") for q, run in zip(plain, runs, strict=True)]
        said += [Text(line, "dim") for line in changed.lines]
    if len({run.schedule for run in runs}) > 1:
        pair = [questions[runs.index(run)] for run in verdict.best_two(runs)]
        with output.progress("predicting other shapes") as advance:
            elsewhere = verdict.neighbours(*pair, advance=advance)
        said.append(Text(verdict.of_schedules(runs, elsewhere), "bold"))
    return [*said, Text("")] if said else []
