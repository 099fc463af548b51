"""Changes: a device with some fields, or a whole resource, other than they are; what depends on them follows.

A resource (`mufu`, `tensor`, `hbm`, `sms`, ..) takes a factor, `hbm=x2`. A field takes a value or a factor, as
`hbm_bytes_per_s=9.6e12` or `power.tensor_w=x0.5`. The field that a resource is known by takes the rest of the resource along; any
other changes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import UsageError, did_you_mean
from ..values import shown
from .device import FIELDS, Device, sections, with_fields
from .doubling import RESOURCES


class _Head(NamedTuple):
    """The field that a resource is known by, how its fields follow a factor, and what does not follow."""

    field: str
    follow: Callable[[Device, float], dict]
    stays: str


def _sms(device: Device, factor: float) -> dict:
    """SMs, and the watts that their units add together."""
    watts = {name: factor * getattr(device, name) for name in _SM_WATTS}
    return {"sms": round(factor * device.sms)} | watts


def _clock(device: Device, factor: float) -> dict:
    """The boost clock, and the watts of units that work so much more often; a launch takes as many seconds as before."""
    watts = {name: factor * getattr(device, name) for name in _SM_WATTS}
    launch = round(factor * device.kernel_launch_cycles)
    return {"max_clock_hz": factor * device.max_clock_hz, "kernel_launch_cycles": launch} | watts


_SM_WATTS = ("tensor_w", "issue_w", "mufu_w", "smem_w")
_HEADS: Mapping[str, _Head] = {
    "mufu": _Head("mufu_cycles", RESOURCES["MUFU"], "its latency stays"),
    "tensor": _Head("tensor_flops_per_cycle", RESOURCES["tensor cores"], "latency and issue of WGMMA stay"),
    "issue": _Head("issue_per_cycle", RESOURCES["issue"], "each pipe keeps its own rate"),
    "smem": _Head("smem_bytes_per_cycle", RESOURCES["shared memory"], "its size and latency stay"),
    "l2": _Head("l2_bytes_per_cycle", RESOURCES["L2"], "its size, latency and joules per byte stay"),
    "hbm": _Head("hbm_bytes_per_s", RESOURCES["HBM"], "its size, latency and joules per byte stay"),
    "power": _Head("power_limit_w", RESOURCES["power limit"], "what units draw stays"),
    "launch": _Head("kernel_launch_cycles", RESOURCES["launch"], "clusters and barriers stay"),
    "sms": _Head("sms", _sms, "L2, HBM, their latencies and the power limit stay: set them too"),
    "clock": _Head("max_clock_hz", _clock, "latencies of L2 and HBM stay as many cycles, and the power limit stays"),
}
_SYNONYMS = {"tensor cores": "tensor", "shared memory": "smem", "sm": "sms", "bandwidth": "hbm", "memory": "hbm", "exp2": "mufu"}
_PLAIN = ("name", "architecture")


@dataclass(frozen=True)
class Changed:
    """A device after changes, and a line for each that says what followed and what did not."""

    device: Device
    lines: tuple[str, ...]

    @property
    def what(self) -> str:
        """The changes in short, as the device's name has them."""
        return self.device.name.partition(" with ")[2]


def change(device: Device, settings: Sequence[str]) -> Changed:
    """The device with these changes, one after another, each as `hbm=x2`, `l2_bytes=1e8` or `power.tensor_w=x0.5`.

    Its name says what changed. Raises UsageError, one sentence, for a field that is not there (with the nearest name), that is in
    another section, or whose value no GPU could have.
    """
    name, lines, words = device.name, [], []
    for setting in settings:
        asked, values, line = _one(device, setting)
        device = with_fields(device, values, f"--set {setting}", "changed by --set")
        lines.append(line)
        words.append(asked)
    if not settings:
        return Changed(device, ())
    said = f"{name} with {', '.join(words)}"
    if len(said) > 64:
        said = f"{name[:40]} with {len(words)} changes"
    return Changed(with_fields(device, {"name": said}, "--set", "the fields that changed"), tuple(lines))


def _one(device: Device, setting: str) -> tuple[str, dict, str]:
    """What was asked in words, the fields that change, and the line that says so."""
    key, equals, value = setting.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not value:
        raise UsageError(f"--set {shown(setting)} is not of the form field=value or field=x2, as hbm=x2")
    if "=" in value:
        raise UsageError(f"--set {shown(setting)} is several changes: give each its own --set, as --set mufu=x2 --set hbm=x2")
    section, dot, bare = key.rpartition(".")
    if not dot and key.lower() in _HEADS:
        head = _HEADS[key.lower()]
        factor = _factor(value)
        if factor is None and key.lower() not in FIELDS:
            raise UsageError(f"--set {setting}: {key} is several fields and takes a factor, as {key}=x2; or set {head.field}")
        bare = head.field
        return _followed(device, key.lower(), head, bare, factor, value, setting)
    _known(bare, section, dot, setting)
    named = next((name for name, head in _HEADS.items() if head.field == bare), None)
    if named:
        return _followed(device, bare, _HEADS[named], bare, _factor(value), value, setting)
    new = _value(device, bare, value, setting)
    return _words(bare, value), {bare: new}, f"{bare} {_arrow(device, bare, new)}; nothing follows it, all else stays"


def _followed(
    device: Device, said: str, head: _Head, field: str, factor: float | None, value: str, setting: str
) -> tuple[str, dict, str]:
    """A resource's fields, scaled together; a factor of its own name is of its rate, of a field of cycles of the cycles."""
    by_cycles = FIELDS[field].metadata["unit"] == "cycles"
    before = getattr(device, field)
    if factor is None or (by_cycles and said == field):
        new = _value(device, field, value, setting)
        if not new:
            raise UsageError(f"--set {setting}: nothing takes no time; give cycles above 0")
        factor = before / new if by_cycles else new / before
        values = head.follow(device, factor) | {field: new}
    else:
        values = head.follow(device, factor)
    first = f"{field} {_arrow(device, field, values[field])}"
    rest = [f"{name} {_arrow(device, name, new)}" for name, new in values.items() if name != field]
    follows = f"; with it {', '.join(rest)}" if rest else ""
    return _words(said, value), values, f"{first}{follows}; {head.stays}"


def _known(field: str, section: str, dot: str, setting: str) -> None:
    """Raise UsageError where there is no such field, or not in that section."""
    if field in _PLAIN:
        raise UsageError(f"--set {setting}: {field} is no figure; a device of your own is a TOML file (`fasim devices`)")
    if field not in FIELDS:
        known = (*FIELDS, *_HEADS)
        near = did_you_mean(field, known, _SYNONYMS) or "; `fasim devices h200` lists the fields"
        raise UsageError(f"--set {setting}: a device has no field {shown(field)}{near}")
    where = sections()
    if dot and section != where[field]:
        there = "" if section in where.values() else f"; the sections are {', '.join(dict.fromkeys(where.values()))}"
        raise UsageError(f"--set {setting}: {field} is in section {where[field]!r}, not in {shown(section)}{there}")


def _factor(value: str) -> float | None:
    """The factor of a value such as x2; None where it is none."""
    if value[:1] not in ("x", "×"):
        return None
    try:
        factor = float(value[1:])
    except ValueError:
        factor = math.nan
    if not 0 < factor < 1e6:
        raise UsageError(f"a factor is x and a number above zero, as x2 or x0.5, not {shown(value)}")
    return factor


def _value(device: Device, field: str, value: str, setting: str) -> int | float:
    """The new value of a field; a whole number where the field is one, cycles rounded up."""
    factor = _factor(value)
    whole = FIELDS[field].type == "int"
    if factor is not None:
        new = getattr(device, field) * factor
        return (math.ceil(new) if FIELDS[field].metadata["unit"] == "cycles" else round(new)) if whole else new
    try:
        new = float(value.replace("_", ""))
    except ValueError:
        new = math.nan
    if not math.isfinite(new):
        raise UsageError(f"--set {setting}: {shown(value)} is neither a number nor a factor such as x2")
    return int(new) if whole and new == int(new) else new


def _arrow(device: Device, field: str, new: float) -> str:
    unit = FIELDS[field].metadata["unit"]
    said = "" if unit in ("count", "flag", "ratio") else f" {unit}"
    return f"{getattr(device, field):g} -> {new:g}{said}"


def _words(said: str, value: str) -> str:
    """Fit for a device's name."""
    return f"{said} {value.replace('×', 'x').replace('_', '')}"
