"""A device file's calibrated fields from the recordings: each by one formula, with spread, date and the run it came from.

`formulas.DERIVATIONS` is the whole list. A field without one is a datasheet figure, a published one, or counters of
a recorded run, and says so in the file. The
watts of each unit are one fit over many loops (power_fit.py). Needs neither GPU nor torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...simulator.devices.device import FIELDS, load_device
from ...simulator.errors import UsageError
from ...simulator.reading import read_json
from .formulas import DERIVATIONS

SCHEMA = "fasim.calibration/1"
PLACE = "traces/recorded/calibration"


@dataclass(frozen=True)
class Calibrated:
    """A field's new value and source."""

    field: str
    value: float | int
    source: str


def read(folder: Path) -> dict[str, dict]:
    """The recordings of a folder by name. Raises UsageError where one is missing or is none."""
    found = {}
    for name in sorted({name for each in DERIVATIONS for name in each.recordings}):
        path = folder / f"{name}.json"
        if not path.exists():
            raise UsageError(f"recording {path} is missing; record it with python -m fasim.kernels.calibrate.{name}")
        record = read_json(path, "recording")
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise UsageError(f"{path} is not a calibration recording ({SCHEMA})")
        found[name] = record
    return found


def derive(recordings: Mapping[str, dict]) -> list[Calibrated]:
    """Every calibrated field, in the order of DERIVATIONS. Raises UsageError where a recording lacks a figure."""
    answer = []
    for each in DERIVATIONS:
        records = [recordings[name] for name in each.recordings]
        try:
            found = each.formula(*(record["results"] for record in records))
        except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
            names = ", ".join(each.recordings)
            raise UsageError(f"{each.field} cannot be derived from {names}: {type(error).__name__} {error}") from None
        gpu = records[0]["device"].removeprefix("NVIDIA ")
        places = " and ".join(f"{PLACE}/{name}.json" for name in each.recordings)
        low, high = _shown(found.low, each.digits), _shown(found.high, each.digits)
        spread = f"; seen {low} to {high}" if low != high else ""
        value = round(found.value, each.digits) if each.digits else round(found.value)
        answer.append(Calibrated(each.field, value, f"{places}, {gpu}, {records[0]['date']}: {found.how}{spread}"))
    return answer


def update(text: str, fields: list[Calibrated]) -> str:
    """A device file's text with these fields' values and sources; every other line stays as it was.

    Raises UsageError for a field that the text does not give on one line of its own.
    """
    for each in fields:
        line = re.compile(rf"^{each.field} = \{{.*\}}$", re.MULTILINE)
        if len(line.findall(text)) != 1:
            raise UsageError(f"the device file does not give {each.field} on one line of its own")
        text = line.sub(lambda _, each=each: line_of(each), text)
    return text


def updated(path: Path, fields: list[Calibrated], base: str) -> str:
    """What the device file at `path` is to hold: its text with these fields, or a new one that starts from `base`."""
    if not path.exists():
        return new_file(base, fields)
    try:
        return update(path.read_text(encoding="utf-8"), fields)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"device file {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def line_of(each: Calibrated) -> str:
    """The field as a line of a device file."""
    unit = FIELDS[each.field].metadata["unit"]
    value = each.value if FIELDS[each.field].type == "int" else repr(float(each.value))
    return f"{each.field} = {{ value = {value}, unit = {json.dumps(unit)}, source = {json.dumps(each.source)} }}"


def new_file(base: str, fields: list[Calibrated]) -> str:
    """A device file that starts from a built-in device and gives the calibrated fields. Raises UsageError for no such base."""
    load_device(base)
    return f'base = "{base}"\n\n[calibrated]\n' + "".join(line_of(each) + "\n" for each in fields)


def _shown(value: float, digits: int) -> str:
    return f"{value:,.{max(digits, 1) if value != round(value) else 0}f}"


# -- the formulas -----------------------------------------------------------------------------------------------------
