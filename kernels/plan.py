"""A plan: which kernels to measure on which workloads, written in TOML as cross products.

    [[runs]]
    kernels = ["fa3", "pingpong"]
    seqlen = [1024, 4096, 16384]
    head_dim = [64, 128]
    causal = [false, true]
    tokens = 16384     # batch = tokens / seqlen, at least 1
    hidden = 2048      # heads = hidden / head_dim

Every field of a Workload may be given, as one value or a list; `tokens` and `hidden` are the papers' way to say batch and
heads, `heads_per_kv` that to say kv_heads.
"""

from __future__ import annotations

import itertools
import tomllib
from dataclasses import dataclass
from pathlib import Path

from ..simulator.errors import UsageError
from ..simulator.workload import Workload

_FIELDS = ("batch", "heads", "kv_heads", "seqlen", "seqlen_q", "seqlen_k", "head_dim", "dtype", "causal")
_PAPERS = ("tokens", "hidden", "heads_per_kv")


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
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"plan {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"plan {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"plan {path} is not valid TOML: {error}") from None
    blocks = tree.get("runs")
    if set(tree) != {"runs"} or not isinstance(blocks, list) or not blocks:
        raise UsageError(f"plan {path} must hold [[runs]] blocks and nothing else")
    try:
        found = [entry for block in blocks for entry in _expand(block)]
    except UsageError as error:
        raise UsageError(f"plan {path}: {error}") from None
    return list(dict.fromkeys(found))


def _expand(block: dict) -> list[Entry]:
    known = ("kernels", *_FIELDS, *_PAPERS)
    if unknown := sorted(block.keys() - set(known)):
        raise UsageError(f"unknown field {unknown[0]!r} ({', '.join(known)})")
    if not block.get("kernels"):
        raise UsageError("a [[runs]] block names no kernels")
    names = [name for name in known if name in block and name != "kernels"]
    values = [block[name] if isinstance(block[name], list) else [block[name]] for name in names]
    workloads = [_workload(dict(zip(names, chosen, strict=True))) for chosen in itertools.product(*values)]
    kernels = block["kernels"] if isinstance(block["kernels"], list) else [block["kernels"]]
    return [Entry(kernel, workload) for workload in workloads for kernel in kernels]


def _workload(given: dict) -> Workload:
    tokens, hidden, share = (given.pop(name, None) for name in _PAPERS)
    if tokens is not None:
        length = given.get("seqlen") or given.get("seqlen_q")
        if not isinstance(length, int) or length <= 0:
            raise UsageError("tokens needs a seqlen")
        given.setdefault("batch", max(1, tokens // length))
    if hidden is not None:
        given.setdefault("heads", max(1, hidden // given.get("head_dim", 128)))
    if "batch" not in given or "heads" not in given:
        raise UsageError("a [[runs]] block needs batch or tokens, and heads or hidden")
    if share is not None:
        given.setdefault("kv_heads", max(1, given["heads"] // share))
    return Workload(**given)
