"""Grid: lists and ranges of options, and the questions at their crossings.

A range is `512..16k` (doubling), `512..4k+512` (by a step) or `64..4096x4` (by a factor); `k` and `m` stand for 1024 and 1024^2.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ...simulator.clock import REGIMES
from ...simulator.devices.changes import change
from ...simulator.devices.device import Device, load_device
from ...simulator.errors import UsageError, did_you_mean
from ...simulator.predict import default_tile
from ...simulator.problem.tile import Tile
from ...simulator.problem.workload import DIRECTIONS, Workload
from ...simulator.schedules import find_schedule
from ...simulator.values import shown
from ..predictions import Question

DEFAULTS: Mapping[str, object] = {
    "schedule": "fa3",
    "device": "h100-sxm",
    "set": "",
    "direction": "forward",
    "batch": 4,
    "tokens": None,
    "heads": 16,
    "kv_heads": None,
    "seqlen_q": None,
    "seqlen_k": None,
    "seqlen": 8448,
    "head_dim": 128,
    "dtype": "fp16",
    "causal": False,
    "tile": None,
    "stages": None,
    "cluster": None,
    "clock_mhz": None,
    "regime": "sustained",
}
"""The axes in the order in which a sweep goes through them, the last the fastest, and what each is unless asked."""
MAX_POINTS = 1_000_000
_ITEM = re.compile(r"(\d{1,12})([km]?)", re.IGNORECASE)
_RANGE = re.compile(r"(\d{1,12}[km]?)\.\.(\d{1,12}[km]?)(?:([+x])(\d{1,12}[km]?))?", re.IGNORECASE)


@dataclass(frozen=True)
class Point:
    """One crossing: what was asked, and the question that it comes to, or why there is none."""

    asked: tuple[tuple[str, object], ...]
    question: Question | None
    error: str = ""


def whole_numbers(text: str, option: str) -> list[int]:
    """The numbers of a list such as "1,2,4" or "512..16k,24k". Raises UsageError."""
    found: list[int] = []
    for item in text.split(","):
        match = _RANGE.fullmatch(item.strip())
        if match:
            first, last = _number(match[1], option), _number(match[2], option)
            step = _number(match[4] or "2", option)
            if last < first or step < 1 or (match[3] != "+" and (step < 2 or first < 1)):
                raise UsageError(f"{option} {shown(item)}: a range goes upwards, as 512..16k, 512..4k+512 or 64..4096x4")
            found += _steps(first, last, step, match[3] == "+")
        else:
            found.append(_number(item, option))
    return list(dict.fromkeys(found))


def words(text: str) -> list[str]:
    """The parts of a list such as "fa3,pingpong"."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def settings(groups: Sequence[str]) -> list[str]:
    """Each --set of a sweep is an axis: "hbm=x1,x2" has two values; the crossings, changes joined by ";"."""
    axes = []
    for group in groups:
        key, equals, values = group.partition("=")
        if not equals or not words(values):
            raise UsageError(f"--set {shown(group)} is not of the form field=value or field=x2; in a sweep also hbm=x1,x2,x4")
        if "=" in values:
            raise UsageError(f"--set {shown(group)} is several changes: give each its own --set, as --set mufu=x2 --set hbm=x2")
        axes.append([f"{key.strip()}={value}" for value in words(values)])
    return [";".join(each) for each in itertools.product(*axes)] if axes else [""]


def points(axes: Mapping[str, object]) -> list[Point]:
    """Every crossing of the axes, a value or a list of values each, in the order of DEFAULTS.

    A crossing that is not possible (a tile that does not fit, a head dim that a schedule does not take) has the sentence that says
    so. Raises UsageError for an unknown axis, schedule or device, and for more than MAX_POINTS crossings.
    """
    if unknown := sorted(axes.keys() - DEFAULTS.keys()):
        raise UsageError(f"a sweep has no {unknown[0]!r}{did_you_mean(unknown[0], DEFAULTS)}")
    lists = {name: _listed(axes.get(name, usual)) for name, usual in DEFAULTS.items()}
    if "seqlen_q" in axes or "seqlen_k" in axes:
        if "seqlen" in axes:
            raise UsageError("seqlen sets both lengths: give it alone, or seqlen_q and seqlen_k")
        lists["seqlen"] = [None]
    for name, values in lists.items():
        if not values:
            raise UsageError(f"{name} is an empty list: give one value at least")
    count = 1
    for values in lists.values():
        count *= len(values)
    if count > MAX_POINTS:
        raise UsageError(f"a sweep of {count:,} predictions is more than is possible ({MAX_POINTS:,}); give shorter lists")
    _known(lists)
    return [_point(dict(zip(lists, each, strict=True))) for each in itertools.product(*lists.values())]


def _known(lists: Mapping[str, Sequence]) -> None:
    """Raise UsageError for a name that is nothing, before anything is predicted."""
    for regime in lists["regime"]:
        if regime not in REGIMES:
            raise UsageError(f"regime {shown(regime)} is not known ({', '.join(REGIMES)}){did_you_mean(str(regime), REGIMES)}")
    for way in lists["direction"]:
        if way not in DIRECTIONS:
            raise UsageError(f"direction {shown(way)} is not known ({', '.join(DIRECTIONS)}){did_you_mean(str(way), DIRECTIONS)}")
        for name in lists["schedule"]:
            if len(lists["direction"]) == 1:
                find_schedule(str(name), way)
    for name, changes in itertools.product(lists["device"], lists["set"]):
        _device(name, changes)


@lru_cache(maxsize=256)
def _device(name: str | Device, changes: str) -> Device:
    return change(name if isinstance(name, Device) else load_device(name), [each for each in changes.split(";") if each]).device


def _point(asked: dict) -> Point:
    values = tuple(asked.items())
    try:
        return Point(values, _question(asked))
    except UsageError as error:
        return Point(values, None, str(error))


def _question(asked: dict) -> Question:
    lengths = {name: asked[name] for name in ("seqlen", "seqlen_q", "seqlen_k") if asked[name] is not None}
    if asked["tokens"] is not None:
        asked = asked | {"batch": max(1, asked["tokens"] // (asked["seqlen"] or asked["seqlen_q"] or 1))}
    shape = {name: asked[name] for name in ("batch", "heads", "kv_heads", "head_dim", "dtype", "causal")}
    workload = Workload(**shape, **lengths, direction=asked["direction"])
    device = _device(asked["device"], asked["set"])
    clock = asked["clock_mhz"]
    if clock is not None and not 0 < clock < float("inf"):
        raise UsageError(f"a clock of {clock:g} MHz is not possible: give MHz above zero, such as 1830")
    tile = _tile(asked, workload, device)
    return Question(workload, asked["schedule"], device, tile, None if clock is None else clock * 1e6, asked["regime"])


def _tile(asked: dict, workload: Workload, device: Device) -> Tile | None:
    changes = {name: asked[name] for name in ("stages", "cluster") if asked[name] is not None}
    tile = asked["tile"]
    if isinstance(tile, Tile):
        return replace(tile, **changes)
    if tile is None and not changes:
        return None
    usual = default_tile(workload, asked["schedule"], device)
    if tile is not None:
        given = Tile.parse(tile)
        consumers = usual.consumers_for(given.block_m, given.block_n if workload.backward else None)
        changes |= {"block_m": given.block_m, "block_n": given.block_n, "consumers": consumers}
    return replace(usual, **changes)


def _listed(value: object) -> list:
    return list(value) if isinstance(value, (list, tuple, range)) else [value]


def _number(text: str, option: str) -> int:
    match = _ITEM.fullmatch(text.strip())
    if not match:
        ranges = "512..16k, 512..4k+512, 64..4096x4"
        raise UsageError(f"{option} {shown(text)} is not a whole number, a list (1,2,4) or a range ({ranges})")
    return int(match[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[match[2].lower()]


def _steps(first: int, last: int, step: int, added: bool) -> Iterator[int]:
    value, count = first, 0
    while value <= last:
        count += 1
        if count > MAX_POINTS:
            raise UsageError(f"a range of more than {MAX_POINTS:,} values is not possible")
        yield value
        value = value + step if added else value * step
