"""Run <-> file: plain JSON (NAME.run.json) or gzip (NAME.run.json.gz), one schema for predicted and measured runs.

The file holds the run's own fields, none that a metric derives, and a checksum over them: a recording is what was
measured, not what somebody made of it. Whatever is damaged, cut short, of another kind or of a newer fasim is refused in
one sentence.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import numpy as np

from ..simulator.errors import UsageError
from ..simulator.problem.workload import Workload
from ..simulator.reading import read_json
from ..simulator.results.run import SPAN, Run
from ..simulator.values import Within, flag, name, number, shown, text
from .files import is_folder, write_whole

SCHEMA, VERSION = "fasim.recorded-run", 4
ADDED = {2: {"measurement": ("trace_overhead",)}, 3: {"traffic": ("l2_lookup_bytes",)}, 4: {"": ("sample", "breakdown", "savings")}}
"""Version -> fields that it added, by the part of a run they are in ("" is the run); older files lack them, they read as None."""
SUFFIXES = (".run.json", ".run.json.gz")
RECORDED = Path(__file__).parent / "recorded" / "runs"
"""The runs that come with the source: of our kernels, beside which the model was made."""
BLIND = RECORDED.parent / "blind"
"""Runs of our kernels recorded after the model was finished, and compared once."""
PEERS = RECORDED.parent / "peers"
"""Runs of other people's kernels."""
TIMELINES = RECORDED.parent / "timelines"
"""Those with the in-kernel trace of some CTAs."""


def save(run: Run, path: Path) -> None:
    """Write `run` to `path`, whole or not at all; compressed where the name ends in .gz.

    Raises UsageError where the name has none of the SUFFIXES or the place cannot be written.
    """
    if not path.name.endswith(SUFFIXES):
        raise UsageError(f"a run is kept in a file that ends in {' or '.join(SUFFIXES)}, not in {path.name}")
    body = _plain(run)
    document = {"schema": f"{SCHEMA}/{VERSION}", "sha256": _checksum(body), "run": body}
    text = json.dumps(document, indent=None if len(run.spans) else 1, allow_nan=False) + "\n"
    data = text.encode()
    write_whole(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def load(path: Path) -> Run:
    """The run that `path` holds.

    Raises UsageError, one sentence, for a file that is not there, cannot be read, is damaged or cut short, holds
    something else, or was written by a newer fasim.
    """
    document = _document(path)
    body = document.get("run")
    if not isinstance(body, dict) or document.get("sha256") != _checksum(body):
        raise UsageError(f"run file {path} is damaged: its contents do not match its checksum; record it again")
    version = int(document["schema"].rpartition("/")[2])
    for part, names in ((part, names) for added, parts in ADDED.items() if added > version for part, names in parts.items()):
        if not part:
            body = dict.fromkeys(names) | body
        elif isinstance(body.get(part), dict):
            body[part] = dict.fromkeys(names) | body[part]
    try:
        return _run(body)
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise UsageError(f"run file {path} is not valid: {' '.join(str(error).split())}") from None


def load_folder(folder: Path) -> dict[str, Run]:
    """Every run of a folder by file name without suffix, in the order of the names.

    Raises UsageError as `load` does, and where the folder holds no run.
    """
    if not is_folder(folder):
        raise UsageError(f"folder {folder} does not exist")
    try:
        found = {path.name: path for path in folder.iterdir() if path.name.endswith(SUFFIXES)}
    except OSError as error:
        raise UsageError(f"folder {folder} cannot be read: {error.strerror or error}") from None
    if not found:
        raise UsageError(f"folder {folder} holds no run (files that end in {' or '.join(SUFFIXES)})")
    return {_stem(name): load(found[name]) for name in sorted(found)}


def load_paths(paths: Sequence[Path]) -> dict[str, Run]:
    """The runs of files and folders, by name. Raises UsageError as `load` and `load_folder` do."""
    found: dict[str, Run] = {}
    for path in paths:
        if is_folder(path):
            found |= load_folder(path)
        else:
            found[_stem(path.name)] = load(path)
    return found


def names_in(folder: Path) -> frozenset[str]:
    """The names of a folder's runs, without reading them; none where it is not there."""
    found = folder.iterdir() if is_folder(folder) else ()
    return frozenset(_stem(path.name) for path in found if path.name.endswith(SUFFIXES))


def _stem(name: str) -> str:
    return name.removesuffix(".gz").removesuffix(".run.json")


def file_name(run: Run) -> str:
    """A file name that says what ran, e.g. fa3-cuda-b4h16s8448d128-fp16-causal-sustained.run.json."""
    w, taken = run.workload, run.measurement
    heads = f"h{w.heads}" + (f"k{w.kv_heads}" if w.kv_heads != w.heads else "")
    length = f"s{w.seqlen_q}" + (f"x{w.seqlen_k}" if w.seqlen_q != w.seqlen_k else "")
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in run.schedule)
    parts = [name, taken.implementation if taken else run.device, f"b{w.batch}{heads}{length}d{w.head_dim}", w.dtype]
    parts += ["packed"] if w.lengths else []
    parts += ["causal"] if w.causal else []
    parts += ["backward"] if w.backward else []
    parts += [taken.regime] + (["warm"] if taken.l2 == "warm" else []) if taken else []
    return "-".join(parts) + SUFFIXES[1 if len(run.spans) else 0]


# -- writing ----------------------------------------------------------------------------------------------------------


def _plain(run: Run) -> dict:
    body = {f.name: getattr(run, f.name) for f in fields(run)}
    body |= {name: value and asdict(value) for name, value in body.items() if is_dataclass(value)}
    body["workload"] = run.workload.to_dict()
    body["tile"] = run.tile and run.tile.to_dict()
    body["savings"] = run.savings and [asdict(saving) for saving in run.savings]
    body["lanes"] = [asdict(lane) for lane in run.lanes]
    body["spans"] = {name: run.spans[name].tolist() for name in SPAN.names}
    return body


def _checksum(body: dict) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


# -- reading ----------------------------------------------------------------------------------------------------------


def _document(path: Path) -> dict:
    """The file as a JSON object of our schema and version."""
    document = read_json(path, "run file")
    schema = document.get("schema") if isinstance(document, dict) else None
    kind, _, version = schema.rpartition("/") if isinstance(schema, str) else ("", "", "")
    if kind == "fasim.run":
        raise UsageError(f"{path} is a report that --json printed, which leaves parts of the run out; give a file that --out wrote")
    if kind != SCHEMA or not (version.isascii() and version.isdecimal() and len(version) < 10):
        raise UsageError(f"{path} is not a run that fasim recorded (its schema is {shown(schema)}, expected {SCHEMA}/{VERSION})")
    if int(version) > VERSION:
        raise UsageError(f"run file {path} is of schema version {version} and this fasim reads up to {VERSION}: update fasim")
    return document


def _run(body: dict) -> Run:
    body = dict(body)
    body["workload"] = Workload(**_mapping(body, "workload"))
    body["spans"] = _spans(_mapping(body, "spans"))
    body.setdefault("kernels", [])  # files of before say nothing of them
    if isinstance(body.get("tile"), dict):
        body["tile"] = {"parts": 1, "packed": True, "resident": 1} | body["tile"]
    run = _build(Run, body, "run")
    name(run.device, "run.device")
    if len(run.spans):
        for column, count in (("lane", len(run.lanes)), ("warp", len(run.lanes)), ("label", len(run.labels))):
            if not 0 <= run.spans[column].min() <= run.spans[column].max() < count:
                raise ValueError(f"spans name a {column} that is not there")
        if (run.spans["end"] < run.spans["start"]).any():
            raise ValueError("a span ends before it starts")
    text(run.origin, "run.origin", ("predicted", "measured"))
    if (run.origin == "measured") != (run.measurement is not None):
        raise ValueError(f"origin is {run.origin!r}, and a measured run, and no other, says how it was measured")
    return run


def _mapping(body: dict, key: str) -> dict:
    if not isinstance(body.get(key), dict):
        raise ValueError(f"{key!r} is missing")
    return body[key]


def _spans(columns: dict) -> np.ndarray:
    if set(columns) != set(SPAN.names) or not all(isinstance(column, list) for column in columns.values()):
        raise ValueError(f"'spans' must have the columns {', '.join(SPAN.names)}")
    if len({len(column) for column in columns.values()}) != 1:
        raise ValueError("the columns of 'spans' must be of one length")
    found = np.zeros(len(columns["start"]), SPAN)
    for key, column in columns.items():
        within = Within(-1, 2**31 - 1) if SPAN[key].itemsize == 4 else Within(-(2**60), 2**60)
        whole = all(type(value) is int for value in column)
        if not whole or (column and not within.least <= min(column) <= max(column) <= within.most):
            raise ValueError(f"spans: column {key!r} must hold whole numbers from {within}")
        found[key] = column
    return found


def _build(kind: type, values: dict, where: str) -> object:
    """A dataclass from plain values, every field there, of its annotated type and within its annotated range."""
    names = {f.name for f in fields(kind)}
    if missing := sorted(names - values.keys()):
        raise ValueError(f"{where} has no {missing[0]!r}")
    if unknown := sorted(values.keys() - names):
        raise ValueError(f"{where} has an unknown field {shown(unknown[0])}")
    hints = _hints(kind)
    return kind(**{key: _value(hints[key], value, f"{where}.{key}") for key, value in values.items()})


@functools.cache
def _hints(kind: type) -> dict[str, object]:
    return typing.get_type_hints(kind, include_extras=True)


_ANY_FIGURE = Within(-1e300, 1e300)


def _value(hint: object, value: object, where: str) -> object:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # of one type and None
        return None if value is None else _value(next(a for a in arguments if a is not type(None)), value, where)
    if origin is typing.Annotated:
        return number(value, arguments[0], arguments[1], where)
    if hint in (int, float):
        return number(value, hint, _ANY_FIGURE, where)
    if hint is bool:
        return flag(value, where)
    if hint is str:
        return text(value, where)
    if isinstance(value, (Workload, np.ndarray)):
        return value
    if origin is dict and isinstance(value, dict):
        keys = [text(key, f"a name in {where}") for key in value]
        return {key: _value(arguments[1], value[key], f"{where}[{shown(key)}]") for key in keys}
    if origin is tuple and isinstance(value, list):
        inner = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(inner) == len(value):
            return tuple(_value(a, each, where) for a, each in zip(inner, value, strict=True))
    elif isinstance(hint, type) and is_dataclass(hint) and isinstance(value, dict):
        return _build(hint, value, where)
    raise ValueError(f"{where} is {shown(value)}, which is not of the expected kind")
