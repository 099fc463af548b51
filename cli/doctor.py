"""`fasim doctor`: what this machine can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import output
from .options import Json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..kernels.doctor import Diagnosis


def doctor(*, json: Json = False) -> None:
    """Say what this machine can do with fasim, what it lacks for the rest, and what to install.

    Looks for a GPU and its driver, torch, triton, NVRTC, Nsight Compute and the permission to read counters,
    compute-sanitizer. Runs nothing on the GPU and changes nothing.

    Example: fasim doctor

    Theory: predicting needs none of this. Clock and power come from the driver, counters from a profiler that the driver
    lets only root use unless told otherwise.
    """
    from ..kernels.doctor import examine

    found = examine()
    if json:
        output.emit_json(found.to_dict())
        return
    output.stdout().print(_shown(found))


def _shown(found: Diagnosis) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from .tables import house_table

    has = house_table("this machine", "", "found")
    for each in found.findings:
        has.add_row(each.name, _mark(each.present), Text(each.found))
    can = house_table("command", "", "for", "missing")
    for ability in found.abilities:
        can.add_row(
            Text(ability.command, "bold"), _mark(ability.possible), Text(ability.what), Text(", ".join(ability.missing), "red")
        )
    needed = {name for ability in found.abilities for name in ability.missing}
    remedies = [
        Text.assemble((each.name, "bold"), f": {each.remedy}")
        for each in found.findings
        if each.name in needed and each.remedy
    ]
    return Group(has, "", can, *(["", Text("to get the rest", "dim"), *remedies] if remedies else []))


def _mark(good: bool):
    from rich.text import Text

    return Text("yes", "green") if good else Text("no", "bold red")
