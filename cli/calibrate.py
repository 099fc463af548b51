"""`fasim calibrate`: microbenchmarks to a device file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ..simulator.errors import UsageError
from . import output
from .options import Json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from ..kernels.calibrate.device_file import Calibrated
    from ..simulator.devices.device import Device
    from ..traces.ablation import Ablation


def calibrate(
    *,
    out: Path | None = None,
    recorded: Path | None = None,
    only: Annotated[tuple[str, ...], Parameter(name="--only", negative=(), show_default=False)] = (),
    write: Path | None = None,
    base: str = "h200",
    ablate: Annotated[bool, Parameter(name="--ablate", negative=())] = False,
    json: Json = False,
) -> int:
    """Measure the fields of a device file by microbenchmarks, and write them with spread, date and recording.

    Runs WGMMA, pipes, softmax, their contention, shared memory, L2, HBM, barriers, launches and power on this machine's
    Hopper GPU, some five minutes, and keeps a recording of each; then derives every calibrated field from the recordings
    and shows it beside the device that comes with the package. No attention kernel takes part. With --recorded nothing
    runs and no GPU is needed. Exit status: 3 without a Hopper GPU or what the microbenchmarks need.

    Example: fasim calibrate --recorded traces/recorded/calibration

    Theory: a constant fitted to attention would make the error table a circle. These come from loops that do one thing at
    a time, so what is left of the error is the model's.

    Parameters
    ----------
    out
        Run the microbenchmarks and keep the recordings in this folder.
    recorded
        Derive from the recordings of this folder, and run nothing.
    only
        Run this microbenchmark alone; repeat it for several. Those left out must be in --out already.
    write
        Device file to update: its calibrated fields, nothing else. A new one starts from --base.
    base
        Built-in device to compare with and to start a new file from.
    ablate
        Predict recorded runs and published bars without each mechanism of the model, and show what its absence costs.
        Runs nothing on a GPU; a quarter of an hour once on two cores, seconds afterwards.
    """
    if ablate:
        if out or recorded or only or write:
            raise UsageError("--ablate changes nothing and records nothing: give it alone, or with --base")
        return _ablate(base, json)
    if (out is None) == (recorded is None):
        raise UsageError("give --out DIR to run the microbenchmarks, or --recorded DIR to derive from recordings")
    if only and recorded is not None:
        raise UsageError("--only chooses the microbenchmarks to run, and --recorded runs none: give one of them")
    from ..kernels.calibrate import device_file
    from ..kernels.validation.check import MissingTool
    from ..simulator.devices.device import load_device

    if out is not None:
        from ..kernels.calibrate import recorder

        try:
            recorder.require()
            output.make_folder(out)
            with output.progress("calibrating") as advance:
                recorder.record(out, only, advance)
        except MissingTool as error:
            output.note(f"fasim: {error}")
            return 3
    fields = device_file.derive(device_file.read(out or recorded))
    if write is not None:
        output.write_file(write, device_file.updated(write, fields, base))
        output.note(f"wrote {len(fields)} fields to {write}")
    if json:
        output.emit_json([dict(vars(each)) for each in fields])
    else:
        output.stdout().print(_shown(fields, load_device(base)))
    return 0


def _ablate(base: str, json: bool) -> int:
    from ..traces.ablation import ablate
    from ..traces.predictions import processes

    with output.progress("predicting") as advance:
        found = ablate(base, advance=advance, processes=processes())
    if json:
        output.emit_json(found.to_dict())
    else:
        output.stdout().print(_ablation(found))
    return 0


def _ablation(found: Ablation) -> RenderableType:
    from rich.text import Text

    from .tables import house_table

    table = house_table("without", *(f">{name}, {count} runs" for name, count in found.runs.items()))
    whole = next(iter(found.errors.values()))
    for without, sets in found.errors.items():
        cells = [
            Text(f"{each.mean:.1%} ({each.worst:+.1%})", "bold" if each.mean > whole[name].mean + 0.0005 else "")
            for name, each in sets.items()
        ]
        table.add_row("nothing: the whole model" if sets is whole else without, *cells)
    return table


def _shown(fields: Sequence[Calibrated], device: Device) -> RenderableType:
    from rich.text import Text

    from .tables import house_table

    table = house_table("field", f">{device.name} has", ">derived", "from")
    for each in fields:
        now = getattr(device, each.field)
        table.add_row(each.field, f"{now:,g}", Text(f"{each.value:,g}", "" if now == each.value else "yellow"), Text(each.source))
    return table
