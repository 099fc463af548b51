"""`fasim roofline`: what each resource alone would allow."""

from __future__ import annotations

from .. import output
from ..options import Json, MachineOptions, PackedOptions, Schedules

_DEFAULT = PackedOptions()
_MACHINE = MachineOptions()


def roofline(
    schedule: Schedules = ("fa3",),
    workload: PackedOptions = _DEFAULT,
    machine: MachineOptions = _MACHINE,
    *,
    json: Json = False,
) -> None:
    """Draw where the workload stands for HBM, L2, tensor cores and MUFU.

    Each resource alone would take some least time; the longest of them bounds the kernel, at the clock that it runs at.
    The plot shows attainable TFLOP/s over FLOPs per HBM byte at the boost clock (or --clock), a letter for each predicted
    schedule, and over it the bound at its own clock.

    Example: fasim roofline standard fa3 --seqlen 512

    Theory: attention's intensity grows with the sequence when S and P stay on chip, and stays flat when they do not:
    that is why standard attention hangs under the sloping HBM roof and FlashAttention reaches the flat one.
    """
    from ...traces.predictions import predict_all
    from ...traces.standing import standing

    problem = workload.build()
    questions = [machine.question(problem, name) for name in schedule]
    with output.progress("predicting") as advance:
        runs = predict_all(questions, advance=advance)
    found = standing([runs[question] for question in questions], machine.load(), machine.clock_hz)
    if json:
        output.emit_json(found.to_dict())
        return
    from .. import standing as render

    output.stdout().print(render.standing(found))
