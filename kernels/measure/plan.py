"""A plan: which kernels to measure on which workloads, written in TOML as cross products.

    [[runs]]
    kernels = ["fa3", "pingpong"]
    seqlen = [1024, 4096, 16384]
    head_dim = [64, 128]
    causal = [false, true]
    tokens = 16384     # batch = tokens / seqlen, at least 1
    hidden = 2048      # heads = hidden / head_dim

`lengths` is a list of batches of packed sequences: of each the length of every sequence, or queries and keys where they differ,
[[100, 2000, 37], [[256, 8000], 37]].

Every field of a Workload may be given, direction = "backward" among them, as one value or a list; `tokens` and `hidden` are the
papers' way to say batch and heads, `heads_per_kv` that to say kv_heads.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

from ...simulator.errors import UsageError
from ...simulator.problem.workload import Workload
from ...simulator.reading import read_toml
from ...simulator.values import Within, number, shown, text

_FIELDS = ("batch", "heads", "kv_heads", "seqlen", "seqlen_q", "seqlen_k", "head_dim", "dtype", "causal", "direction", "lengths")
_PAPERS = ("tokens", "hidden", "heads_per_kv")
_SIZES = Within(1, 1 << 40)
MAX_ENTRIES = 10_000
"""Runs of a plan; at a second or two each, half a day."""


@dataclass(frozen=True)
class Entry:
    """One run to take."""

    kernel: str
    workload: Workload

    def to_dict(self) -> dict:
        """As plain JSON values."""
        return {"kernel": self.kernel, "workload": self.workload.to_dict()}

    @classmethod
    def from_dict(cls, plain: dict) -> Entry:
        """The inverse of to_dict."""
        return cls(plain["kernel"], Workload(**plain["workload"]))


def read(path: Path) -> list[Entry]:
    """The entries of a plan, each once, in order. Raises UsageError, one sentence, for whatever is wrong with it."""
    tree = read_toml(path, "plan")
    blocks = tree.get("runs")
    if set(tree) != {"runs"} or not isinstance(blocks, list) or not blocks or not all(isinstance(b, dict) for b in blocks):
        raise UsageError(f"plan {path} must hold [[runs]] blocks and nothing else")
    found: dict[Entry, None] = {}
    try:
        for block in blocks:
            found |= dict.fromkeys(_expand(block, MAX_ENTRIES - len(found)))
    except UsageError as error:
        raise UsageError(f"plan {path}: {error}") from None
    return list(found)


def _expand(block: dict, room: int) -> list[Entry]:
    known = ("kernels", *_FIELDS, *_PAPERS)
    if unknown := sorted(block.keys() - set(known)):
        raise UsageError(f"unknown field {shown(unknown[0])} ({', '.join(known)})")
    lists = {key: block[key] if isinstance(block[key], list) else [block[key]] for key in known if key in block}
    if empty := [key for key, values in lists.items() if not values]:
        raise UsageError(f"field {empty[0]!r} is an empty list")
    if "kernels" not in lists:
        raise UsageError("a [[runs]] block names no kernels")
    if (entries := math.prod(map(len, lists.values()))) > room:
        raise UsageError(f"its lists multiply to {entries:,} runs, a plan has at most {MAX_ENTRIES:,}")
    kernels = [text(kernel, "kernels") for kernel in lists.pop("kernels")]
    workloads = [_workload(dict(zip(lists, chosen, strict=True))) for chosen in itertools.product(*lists.values())]
    return [Entry(kernel, workload) for workload in workloads for kernel in kernels]


def _workload(given: dict) -> Workload:
    for key, value in given.items():
        if key not in ("dtype", "causal", "direction", "lengths"):
            number(value, int, _SIZES, key)
    tokens, hidden, share = (given.pop(key, None) for key in _PAPERS)
    if tokens is not None:
        length = given.get("seqlen") or given.get("seqlen_q")
        if length is None:
            raise UsageError("tokens needs a seqlen")
        given.setdefault("batch", max(1, tokens // length))
    if hidden is not None:
        given.setdefault("heads", max(1, hidden // given.get("head_dim", 128)))
    if (batch := given.get("lengths")) is not None:
        if not isinstance(batch, list):
            raise UsageError("lengths are a list of batches, each a list of the lengths of its sequences")
        given["lengths"] = tuple((each, each) if isinstance(each, int) else each for each in batch)
        given.setdefault("batch", len(batch))
    if "batch" not in given or "heads" not in given:
        raise UsageError("a [[runs]] block needs batch or tokens, and heads or hidden")
    if share is not None:
        given.setdefault("kv_heads", max(1, given["heads"] // share))
    return Workload(**given)
