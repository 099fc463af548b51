"""`fasim advise`: which kernel a model should use, and what its attention takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ...simulator.errors import UsageError
from .. import output
from ..options import Json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ...traces.answers.advise import Advice


def advise(
    model_config: Path,
    *,
    seqlen: str = "4096",
    batch: int = 1,
    device: str = "h200",
    full: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    forward_only: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", negative=(), show_default=False)] = (),
    workers: int | None = None,
    json: Json = False,
) -> int:
    """Which attention kernel a model should use on a device, and what attention takes: time, bytes, energy, a layer and a step.

    Reads a Hugging Face config.json (heads, key and value heads, head dim, layers). Of the kernels that somebody ships (ours,
    FlashAttention-3's, PyTorch's FlashAttention-2) the one predicted fastest is named for bf16 and FP8, forward and backward; a
    step is all layers, of attention alone. FLOPs and the bytes that any kernel has to move are exact; the rest is predicted.

    Example: fasim advise --model-config config.json --seqlen 2k,8k --batch 4 --device h200

    Theory: attention's FLOPs grow with the square of the length and its bytes with the length, so short sequences are bound by
    latency and launches, long ones by tensor cores and power; the energy follows the time.

    Parameters
    ----------
    model_config
        The model's config.json.
    seqlen
        Lengths, as 2k,8k or 1k..16k.
    batch
        Sequences in the batch.
    device
        Name of a device (see `fasim devices`) or path of your own TOML file.
    full
        No causal mask, as in an encoder.
    forward_only
        Leave out the backward, as for inference.
    set_
        What if: a field or resource of the device, as in fasim predict.
    workers
        Processes. [default: one a core]
    """
    from ...simulator.compiling import COMPILES, heard
    from ...simulator.devices.changes import change
    from ...simulator.devices.device import load_device
    from ...traces.answers import advise as room
    from ...traces.answers.grid import whole_numbers

    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers} is none: give 1 or more")
    model = room.read_config(model_config)
    gpu = change(load_device(device), set_).device
    passes = ("forward",) if forward_only else ("forward", "backward")
    with output.progress("predicting", estimate=True) as advance, heard(lambda: advance(0, 1, COMPILES)):
        lengths = whole_numbers(seqlen, "--seqlen")
        found = room.advise(model, lengths, batch, gpu, not full, directions=passes, advance=advance, workers=workers)
    if json:
        output.emit_json(found.to_dict())
    else:
        output.stdout().print(_shown(found))
    return 0


def _shown(found: Advice) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from ...simulator.units import digits, scaled
    from ..tables import house_table

    table = house_table("seqlen", "pass", "dtype", "kernel", ">a layer", ">a step", ">FLOP", ">HBM", ">energy", ">J/Mtoken", gap=1)
    for each in found.layers:
        row = each.to_dict()
        layer, step = row["layer"], row["step"]
        table.add_row(
            f"{each.run.workload.seqlen:,}", row["pass"], row["dtype"], row["kernel"], scaled(layer["time_s"], "s"),
            scaled(step["time_s"], "s"), scaled(step["flops"], ""), scaled(step["hbm_bytes"], "B"), scaled(step["energy_j"], "J"),
            digits(step["joules_per_million_tokens"]),
        )  # fmt: skip
    title = Text(f"{found.model}; on {found.device}; FLOP, HBM and energy of a step", "dim")
    slower = _others(found)
    parts: list[RenderableType] = [Text(found.sentence, "bold"), Text(""), title, table]
    return Group(*parts, *([Text(""), *slower] if slower else []), *(Text(note, "yellow") for note in found.notes))


def _others(found: Advice) -> list[RenderableType]:
    """How far behind the other kernels are, of the longest length."""
    from rich.text import Text

    from ...simulator.results import metrics

    lines = []
    for each in found.layers:
        if each.others and each.run.workload.seqlen == found.layers[-1].run.workload.seqlen:
            first = metrics.time_s(each.run)
            behind = ", ".join(f"{other.schedule} +{metrics.time_s(other) / first - 1:.0%}" for other in each.others)
            work = each.run.workload
            lines.append(Text(f"{work.seqlen:,} {work.direction} {work.dtype}, behind {each.run.schedule}: {behind}", "dim"))
    return lines
