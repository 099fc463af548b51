"""FlashAttention-3's own tests with our functions in their place: `python -m fasim.kernels.validation.upstream --help`.

--tests is a folder of their files, test_flash_attn.py, padding.py and test_util.py of `hopper/`
(github.com/Dao-AILab/flash-attention), which need einops. They are run, from a copy with the EDITS below, and nothing of them is
kept here. What ours does not have (LEFT_OUT) is not collected. The cases are shuffled, so that a run which ends at its deadline has
seen some of every kind; of several processes each has its kinds (varlen has 12), so that it compiles few kernels. Writes
upstream.json: what passed, what failed and why, what was not reached. `--device cpu` runs them in Triton's interpreter, which cuts
bf16 off and does not round it, so in fp16, and slowly: give `--most-keys 130`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from pathlib import Path

from ...simulator.reading import read_json

TESTS = {
    "output": "test_flash_attn_output", "varlen": "test_flash_attn_varlen_output", "kvcache": "test_flash_attn_kvcache",
    "race": "test_flash_attn_race_condition",
}  # fmt: skip
FILES = ("test_flash_attn.py", "padding.py", "test_util.py")
DISABLED = ("APPENDKV", "LOCAL", "SOFTCAP", "FP8", "PACKGQA", "HDIM96", "HDIM192")
"""What their environment leaves out by its own switches; PACKGQA and SPLIT are choices of a kernel, of which ours makes one."""
LEFT_OUT = {
    "has_qv": True,
    "add_unused_qkv": True,  # seqused
    "new_kv": True,
    "local": True,
    "has_leftpad": True,
    "varlen_q": True,  # against a cache
    "deterministic": True,
    "V_colmajor": True,
}
"""Values of their parameters that ours has no counterpart of."""
HEAD_DIMS = (64, 128, 256)
EDITS = (
    ("([256, 512, d] if d <= 64 else [d])", "[d]"),  # V's head dim as Q's
    ('device = "cuda"', 'device = "{device}"'),
    ("(70 * 1024 ** 3,", "(70 * 1024 ** 3 // {processes},"),  # what all of them fill together
)
ON_CPU = (("[torch.bfloat16] + (", "[torch.float16] + ("),)
NEUTRAL = {"window_size": (-1, -1), "attention_chunk": 0, "softcap": 0.0, "pack_gqa": False, "scheduler_metadata": None}
"""Arguments that say nothing at these values, and that ours does not take at others; any other of no counterpart is None or
absent."""


def interface(deterministic: bool = False) -> types.ModuleType:
    """flash_attn_interface as their tests import it, by our functions; dQ with the same bits every time if `deterministic`."""
    from .. import ops

    def plain(given: dict) -> None:
        for name, value in given.items():
            neutral = NEUTRAL.get(name)
            alike = value is None or value is False or (isinstance(value, (int, float, tuple, list)) and _tuple(value) == neutral)
            if not alike:
                raise NotImplementedError(f"{name}={value!r}")

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, num_splits=1, **given):
        plain(given)
        how = {"num_splits": num_splits if num_splits > 1 else None, "deterministic": deterministic}
        return ops.flash_attn_func(q, k, v, softmax_scale, causal, **how)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False, num_splits=1,
        seqused_q=None, seqused_k=None, **given,
    ):  # fmt: skip
        for used, ends in ((seqused_q, cu_seqlens_q), (seqused_k, cu_seqlens_k)):
            plain({"seqused": None if used is None or (used == ends.diff()).all() else used})
        plain(given)
        longest = int(max_seqlen_q), int(max_seqlen_k)
        return ops.flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, softmax_scale, causal)

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, cache_batch_idx=None, page_table=None, softmax_scale=None,
        causal=False, num_splits=0, return_softmax_lse=False, rotary_seqlens=None, **given,
    ):  # fmt: skip
        plain({"k": k, "v": v, **given})
        about = {"return_lse": return_softmax_lse, "cache_batch_idx": cache_batch_idx}
        return ops.flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens, page_table, softmax_scale, causal, num_splits or None, **about
        )

    made = types.ModuleType("flash_attn_interface")
    made.flash_attn_func, made.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    made.flash_attn_with_kvcache = flash_attn_with_kvcache
    made.flash_attn_combine = made.get_scheduler_metadata = lambda *args, **given: None
    return made


def _tuple(value):
    return tuple(value) if isinstance(value, list) else value


class Run:
    """A pytest plugin: which of their cases are asked, until when, and what became of each."""

    def __init__(self, names: list[str], deadline_s: float, most_keys: int | None, seed: int, share: tuple[int, int]) -> None:
        self.names, self.deadline_s, self.most_keys, self.seed, self.share = names, deadline_s, most_keys, seed, share
        self.started = time.monotonic()
        self.asked: dict[str, int] = {}
        self.outcomes: dict[str, str] = {}
        self.failures: dict[str, str] = {}

    def pytest_collection_modifyitems(self, config, items) -> None:
        """Leave out what ours has not, shuffle the rest, and keep this process's share: cases of as few kinds as can be."""
        kept = [item for item in items if self._wanted(item)]
        chance = random.Random(self.seed)
        chance.shuffle(kept)
        kept.sort(key=kind_of)
        number, of = self.share
        kept = kept[number * len(kept) // of : (number + 1) * len(kept) // of]
        chance.shuffle(kept)
        mine = set(map(id, kept))
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in mine])
        items[:] = kept
        self.asked = dict(Counter(item.originalname for item in kept))

    def _wanted(self, item) -> bool:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        short = self.most_keys is None or max(given.get("seqlen_q", 0), given.get("seqlen_k", 0)) <= self.most_keys
        here = given.get("d", HEAD_DIMS[0]) in HEAD_DIMS
        here = here and not any(given.get(name) == value for name, value in LEFT_OUT.items())
        return item.originalname in self.names and short and here

    def pytest_runtest_logreport(self, report) -> None:
        """One case's outcome."""
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                self.failures[report.nodeid] = (crash.message if crash else str(report.longrepr)).splitlines()[0][:300]

    def pytest_runtest_teardown(self, item) -> None:
        """No further case at the deadline; memory goes back, since other processes have cases of their own on this GPU."""
        if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if time.monotonic() - self.started > self.deadline_s:
            item.session.shouldstop = f"the deadline of {self.deadline_s:g} s"

    def to_dict(self) -> dict:
        """Counts by test, and the failures in words."""
        tests = {}
        for name, asked in sorted(self.asked.items()):
            of = Counter(outcome for case, outcome in self.outcomes.items() if f"::{name}[" in case)
            tests[name] = {"cases": asked, "not_reached": asked - sum(of.values()), **of}
        return {"tests": tests, "failures": self.failures, "seconds": round(time.monotonic() - self.started, 1)}


def kind_of(item) -> tuple[str, ...]:
    """What a kernel is compiled for, of a case: a process that has cases of one kind compiles its kernels once."""
    given = item.callspec.params if hasattr(item, "callspec") else {}
    return (item.originalname, *(str(given.get(name)) for name in ("dtype", "d", "causal")))


def copied(folder: Path, to: Path, device: str, processes: int = 1) -> None:
    """Their files, with the EDITS, in a folder of their own, for one of so many processes. Raises ValueError where an edit has lost
    its place."""
    for name in FILES:
        shutil.copyfile(folder / name, to / name)
    text = (to / FILES[0]).read_text(encoding="utf-8")
    for old, new in (*EDITS, *(ON_CPU if device == "cpu" else ())):
        if old not in text:
            raise ValueError(f"{FILES[0]} has no {old!r}: their tests have changed")
        text = text.replace(old, new.format(device=device, processes=processes))
    (to / FILES[0]).write_text(text, encoding="utf-8")


def run(
    folder: Path,
    which: list[str],
    device: str,
    deadline_s: float,
    most_keys: int | None = None,
    seed: int = 0,
    share: tuple[int, int] = (0, 1),
    deterministic: bool = False,
) -> dict:
    """The answers of their tests, or of share[0] of share[1] parts of them, as `Run.to_dict`."""
    import pytest

    os.environ |= {f"FLASH_ATTENTION_DISABLE_{name}": "TRUE" for name in DISABLED}
    os.environ["FLASH_ATTENTION_DISABLE_SPLIT"] = "FALSE" if which == ["kvcache"] else "TRUE"
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    else:
        import torch

        torch.cuda.set_device(share[0] % torch.cuda.device_count())
    sys.modules["flash_attn_interface"] = interface(deterministic)
    plugin = Run([TESTS[name] for name in which], deadline_s, most_keys, seed, share)
    with tempfile.TemporaryDirectory() as place:
        copied(folder, Path(place), device, share[1])
        sys.path.insert(0, place)
        try:
            options = ["-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "--rootdir", place, "-c", os.devnull]
            status = pytest.main([*options, str(Path(place) / FILES[0])], plugins=[plugin])
        finally:
            sys.path.remove(place)
    return {"which": which, "deterministic": deterministic, "pytest_status": int(status), **plugin.to_dict()}


def merged(parts: list[dict]) -> dict:
    """One answer of several processes': counts added, the longest's seconds, the worst status."""
    tests: dict[str, Counter] = {}
    for part in parts:
        for name, counts in part["tests"].items():
            tests.setdefault(name, Counter()).update(counts)
    failures = {case: message for part in parts for case, message in part["failures"].items()}
    worst = {name: max(part[name] for part in parts) for name in ("pytest_status", "seconds")}
    counts = {name: dict(of) for name, of in tests.items()}
    same_bits = any(part.get("deterministic") for part in parts)
    asked = {"which": max(part["which"] for part in parts), "deterministic": same_bits}
    return {**asked, **worst, "tests": counts, "failures": failures}


def run_apart(arguments: list[str], processes: int) -> dict:
    """`run` in so many processes, each with its share; one that ends without an answer is a failure of its own."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "fasim.kernels.validation.upstream", *arguments]
        outs = [Path(place) / str(number) for number in range(processes)]
        shares = [["--share", f"{number}/{processes}", "--out", str(out)] for number, out in enumerate(outs)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        began = [subprocess.Popen([*command, *share], **pipes) for share in shares]
        said = [process.communicate()[0] for process in began]
        parts = []
        for number, out in enumerate(outs):
            found = [read_json(path, "report") for path in out.glob("*.json")]
            found = [part for part in found if part["tests"]]
            about = {"which": [], "pytest_status": began[number].returncode, "tests": {}, "seconds": 0.0}
            parts += found or [about | {"failures": {f"process {number}": said[number].strip()[-300:]}}]
    return merged(parts) | {"processes": processes}


def main() -> int:
    """Exit status: 0 where all that were reached passed, 1 where one failed, 2 where none was asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tests", type=Path, required=True, help="folder of their hopper/ files")
    parser.add_argument("--only", choices=TESTS, action="append", help="[default: varlen]; kvcache, which splits keys, runs alone")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--deadline", type=float, default=240.0, help="seconds")
    parser.add_argument("--most-keys", type=int, help="longest queries and keys")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deterministic", action="store_true", help="the backward of flash_attn_func in its deterministic mode")
    apart = "side by side, each with its share of the cases, on the visible GPUs in turn"
    parser.add_argument("--processes", type=int, default=1, help=apart)
    parser.add_argument("--share", default="0/1", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, required=True, help="folder for upstream-NAMES.json")
    given = parser.parse_args()
    which = given.only or ["varlen"]
    if "kvcache" in which and len(which) > 1:
        parser.error("--only kvcache splits keys, which the others do not: run it alone")
    given.out.mkdir(parents=True, exist_ok=True)
    if given.processes > 1:
        asked = ["--tests", given.tests, "--device", given.device, "--deadline", given.deadline, "--seed", given.seed]
        asked += ["--most-keys", given.most_keys] if given.most_keys else []
        asked += ["--deterministic"] if given.deterministic else []
        asked += [each for name in which for each in ("--only", name)]
        found = run_apart(list(map(str, asked)), given.processes)
    else:
        share = tuple(map(int, given.share.split("/")))
        found = run(given.tests, which, given.device, given.deadline, given.most_keys, given.seed, share, given.deterministic)
    import torch

    found |= {"torch": torch.__version__, "device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu"}
    (given.out / f"upstream-{'-'.join(which)}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps({name: found[name] for name in ("tests", "seconds")}) + "\n")
    return 1 if found["failures"] else 0 if found["tests"] else 2


if __name__ == "__main__":
    sys.exit(main())
