"""`fasim predict`: one schedule on one workload, or several beside each other."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from .. import output
from ..options import Json, MachineOptions, PackedOptions, Schedules

_DEFAULT = PackedOptions()
_MACHINE = MachineOptions()
_USUAL = ("fa3",)


def predict(
    schedule: Schedules = _USUAL,
    workload: PackedOptions = _DEFAULT,
    machine: MachineOptions = _MACHINE,
    *,
    kernel: str | None = None,
    why: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    json: Json = False,
) -> int:
    """Predict cycles, time, bytes and power of one schedule, or compare several.

    Shows time, TFLOP/s, how busy tensor cores, MUFU and issue slots are, where the tensor cores' time goes, the cause
    that costs most and what would help, and the bytes of every tensor at three levels (algorithmic, L2, HBM). Where the
    papers measured this very workload, their figure stands beside a prediction at their clock. Of several schedules the first line
    says which is the fastest, by how much, why, and at which lengths, masks and head dims that turns; with --set it says what the
    change does to the time.

    With --kernel a compiled kernel takes the place of a schedule: its tile, the order of its main loop and the instructions between
    are read from its machine code, of which nothing runs. With --schedule beside it the order is the schedule's and the code the
    kernel's.

    Example: fasim predict warp-specialized pingpong fa3 --causal

    Example: fasim predict fa2 --pass both

    Example: fasim predict fa3 --set hbm=x2 --set sms=x1.2

    Example: fasim predict --kernel ./libattention.so:forward_d128 --dtype bf16

    Theory: attention needs one exp2 for every 4 d FLOPs, and the MUFU is hundreds of times slower than the tensor
    cores, so what decides is how much of the softmax a schedule hides under the GEMMs.

    Parameters
    ----------
    kernel
        A compiled kernel: FILE or FILE:NAME, a .cubin or a library for a Hopper and a part of the kernel's name; one of ours by its
        schedule's name, in Gluon as gluon-fa3; or fa3-fwd-0.0.3, FlashAttention-3's own, of which we keep what was read.
    why
        Also predict with each resource twice as fast: how much time falls.
    """
    from ...traces.predictions import predict_all

    problems = [workload.build(direction) for direction in workload.directions()]
    if kernel is not None:
        from ..compiled import adopted

        status, schedule = adopted(kernel, problems, () if schedule is _USUAL else schedule, machine.tile)
        if status:
            return status
    questions = [machine.question(problem, name, why) for name in schedule for problem in problems]
    with output.progress("predicting") as advance:
        found = predict_all(questions, advance=advance)
    runs = [found[question] for question in questions]
    if json:
        output.emit_json([run.to_dict() for run in runs])
        return 0
    from ...traces.published import beside
    from .. import tables
    from ..verdicts import sentences

    console = output.stdout()
    for number in range(len(problems)):
        shown, asked = runs[number :: len(problems)], questions[number :: len(problems)]
        published = [beside(run, machine.load()) for run in shown]
        for line in sentences(asked, shown, machine):
            console.print(line)
        console.print(tables.result(shown[0], published[0]) if len(shown) == 1 else tables.comparison(shown, published))
        console.print()
    if len(problems) > 1:
        console.print(tables.together(runs, len(problems)))
    return 0
