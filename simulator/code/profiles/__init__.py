"""Profiles: the main loops of compiled kernels as they were read, each with compiler, source and tool.

kernels/compile/profile.py makes the files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ...errors import UsageError
from ...reading import read_json
from ..pipeline import Pipeline

HERE = Path(__file__).parent
SCHEMA = "fasim.profiles/1"
MAX_BYTES = 8 << 20


@dataclass(frozen=True)
class Profile:
    """One compiled kernel, and where its machine code came from."""

    schedule: str  # whose order it has, where there is one
    head_dim: int
    dtype: str
    causal: bool
    kernel: str  # its name in the machine code
    origin: str  # a package with its version, or the source
    sha256: str  # of the source, or of the library
    compiler: str
    tool: str  # disassembler
    pipeline: Pipeline

    def to_dict(self) -> dict:
        """As plain JSON values."""
        return vars(self) | {"pipeline": self.pipeline.to_dict()}


def write(path: Path, profiles: Iterable[Profile]) -> None:
    """Keep them, one a line."""
    lines = ",\n".join(json.dumps(each.to_dict(), separators=(",", ":")) for each in profiles)
    path.write_text(f'{{"schema":"{SCHEMA}","profiles":[\n{lines}\n]}}\n', encoding="utf-8")


OURS = "ours"


def names() -> tuple[str, ...]:
    """Other people's libraries of which there are profiles, with their versions."""
    return tuple(sorted(path.stem for path in HERE.glob("*.json") if path.stem != OURS))


@cache
def load(name: str) -> tuple[Profile, ...]:
    """Those of one file of this folder, by its name without .json. Raises UsageError where it is damaged."""
    path = HERE / f"{name}.json"
    data = read_json(path, "the profiles", MAX_BYTES)
    try:
        return tuple(Profile(**{**each, "pipeline": Pipeline.from_dict(each["pipeline"])}) for each in data["profiles"])
    except (KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged: {error}") from None
