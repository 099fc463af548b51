"""`fasim schedules`, `fasim devices` and `fasim disasm`: what is there, without a prediction."""

from __future__ import annotations

import os
from pathlib import Path

from ...simulator.errors import UsageError
from .. import output
from ..options import Json, Schedule, ShapeOptions, TileOptions

_SHAPE = ShapeOptions()
_TILE = TileOptions()
MAX_KV_BLOCKS = 1000


def schedules(*, new: Path | None = None, json: Json = False) -> None:
    """List the schedules: the idea of each and where it comes from; or start one of your own.

    A schedule of your own is a Python file with a function of verbs. Wherever a schedule is named, name it as
    ./mine.py:my_schedule. The file is your own code and is run as such; what it says is checked before it is replayed.

    Example: fasim schedules

    Theory: two neighbours in the list differ by one idea; the difference of their files is that idea.

    Parameters
    ----------
    new
        Write a schedule that works at once to this file, to be changed; a file that is there is left alone.
    """
    from ...simulator.schedules import BACKWARD, SCHEDULES

    if new is not None:
        _start(new)
        return

    if json:
        every = [*SCHEDULES.values(), *BACKWARD.values()]
        output.emit_json([{"name": s.name, "pass": s.direction, "summary": s.summary, "paper": s.paper} for s in every])
        return
    from .. import tables

    console = output.stdout()
    console.print(tables.schedules(SCHEDULES.values()))
    console.print("\nof the backward, with --pass backward", style="dim")
    console.print(tables.schedules(BACKWARD.values()))


def _start(path: Path) -> None:
    from ...simulator.schedules import own, template

    if path.suffix != ".py":
        raise UsageError(f"--new {path} is not the name of a Python file: give one that ends in .py, such as mine.py")
    if os.path.lexists(path):
        raise UsageError(f"{path} is there already and is left as it is: give another name")
    output.write_file(path, Path(template.__file__).read_text(encoding="utf-8").replace("./mine.py", own.shown_path(path)))
    output.note(f"wrote {path}; try: fasim predict --schedule {own.shown_path(path)}:my_schedule")


def devices(name: str | None = None, /, *, json: Json = False) -> None:
    """List the devices, or every field of one with its source.

    Example: fasim devices h200

    Theory: a field is a datasheet figure, a published one, or a microbenchmark of ours; none is fitted to attention.

    Parameters
    ----------
    name
        A device, or the path of your own TOML file.
    """
    from ...simulator.devices.device import DEVICE_NAMES, load_device

    found = {each: load_device(each) for each in ([name] if name else DEVICE_NAMES)}
    from .. import tables

    if json:
        fields = {each: tables.device_fields(device) for each, device in found.items()}
        output.emit_json(fields)
        return
    output.stdout().print(tables.device(found[name]) if name else tables.devices(found))


def disasm(
    schedule: Schedule,
    workload: ShapeOptions = _SHAPE,
    machine: TileOptions = _TILE,
    *,
    kv_blocks: int = 3,
    json: Json = False,
) -> None:
    """Print the instruction streams that a schedule records.

    One stream per warp, as the engine replays them: loads, waits with barrier and generation, GEMMs, arithmetic by
    instruction class, hand-overs.

    Example: fasim disasm pingpong --kv-blocks 2

    Theory: a schedule is its order of instructions; everything the timeline shows follows from this text.

    Parameters
    ----------
    kv_blocks
        K/V blocks of the loop to record, up to 1,000.
    """
    if kv_blocks <= 0:
        raise UsageError(f"--kv-blocks {kv_blocks} must be positive")
    if kv_blocks > MAX_KV_BLOCKS:
        raise UsageError(f"--kv-blocks {kv_blocks} is more than {MAX_KV_BLOCKS:,}, and the loop repeats itself long before")
    from ...simulator.language.program import disassemble
    from ...simulator.predict import default_tile, programs

    problem, device = workload.build(), machine.load()
    tile = machine.choose_tile(problem, schedule, device) or default_tile(problem, schedule, device)
    texts = [disassemble(program) for program in programs(problem, schedule, device, tile, kv_blocks)]
    if json:
        output.emit_json({"schedule": schedule, "kernels": [text.splitlines() for text in texts]})
        return
    output.emit_text("\n\n".join(text.rstrip() for text in texts))
