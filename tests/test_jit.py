"""Compiled code: its cache may be gone, closed or damaged and the answer stays; its loops stop and go on as if they had not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

import fasim
from fasim.simulator.jit import CacheWarning, compiled, inlined
from fasim.simulator.predict import predict
from fasim.simulator.problem.workload import Workload
from fasim.simulator.replay import chip, engine, traffic

ADD = """
import warnings
from fasim.simulator.jit import compiled
warnings.simplefilter("always")

@compiled()
def add(a, b):
    return a + b

print(add(2, 3), sum(add.stats.cache_hits.values()))
"""


def once(tmp_path: Path, **env: str) -> tuple[str, str]:
    """What a fresh process prints that compiles, or loads, one function: the sum and the hits of the cache; and stderr."""
    module = tmp_path / "adds.py"
    if not module.exists():
        module.write_text(ADD)
    root = str(Path(fasim.__file__).parent.parent)
    env = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")} | env
    done = subprocess.run([sys.executable, module], env=env | {"PYTHONPATH": root}, capture_output=True, text=True, check=True)
    return done.stdout.strip(), done.stderr


def test_a_damaged_cache_is_compiled_again_and_then_whole(tmp_path):
    place = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert once(tmp_path, **place)[0] == "5 0"
    assert once(tmp_path, **place)[0] == "5 1"
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".nbi", ".nbc")]
    assert {path.suffix for path in kept} == {".nbi", ".nbc"}
    for path in kept:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert once(tmp_path, **place) == ("5 0", "")
        assert once(tmp_path, **place) == ("5 1", "")
    (code,) = (path for path in kept if path.suffix == ".nbc")
    whole = bytearray(code.read_bytes())
    whole[len(whole) // 2] ^= 1  # one bit of what would be executed
    code.write_bytes(whole)
    assert once(tmp_path, **place) == ("5 0", "")


def test_a_cache_that_cannot_be_written_costs_time_and_says_so_once(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "__pycache__").write_text("")  # where numba would look beside the source
    nowhere = {"NUMBA_CACHE_DIR": str(tmp_path / "file"), "XDG_CACHE_HOME": str(tmp_path / "file"), "HOME": str(tmp_path / "file")}
    answer, said = once(tmp_path, **nowhere)
    assert answer == "5 0"
    assert said.count("CacheWarning") == 1 and "NUMBA_CACHE_DIR" in said and "Traceback" not in said


def test_a_folder_that_goes_away_while_it_compiles_costs_nothing_but_the_copy(tmp_path, monkeypatch):
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("fasim.simulator.jit._told", [])

    @compiled()
    def double(a):
        return a + a

    def gone(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile.save", gone)
    with pytest.warns(CacheWarning, match="NUMBA_CACHE_DIR"):
        assert double(4) == 8


def test_what_would_allocate_is_refused_since_its_reference_counts_cost_more_than_the_work():
    @compiled()
    def squares(n):
        return np.zeros(n).sum()

    with pytest.raises(numba.TypingError):
        squares(4)


def test_a_part_is_compiled_into_the_whole_and_has_no_wrappers_of_its_own():
    """Which are a third of the first compilation."""

    @inlined
    def half(n):
        return n >> 1

    @compiled()
    def quarter(n):
        return half(half(n))

    assert quarter(40) == 10
    (part,) = half.overloads.values()
    assert part.library.get_llvm_str().count("\ndefine ") == 1
    with pytest.raises(TypeError, match="half is a part of a compiled function"):
        half(40)


def test_a_replay_that_stops_and_goes_on_is_the_same_replay(monkeypatch):
    """Every loop returns after a few events, to hear an interrupt; nothing of a run may depend on how many."""
    work = Workload(1, 3, 700, 64, causal=True)
    for schedule in ("fa3", "standard"):
        whole = predict(work, schedule)
        with monkeypatch.context() as patch:
            for module in (engine, traffic, chip):
                patch.setattr(module, "SLICE", 37)
            parts = predict(work, schedule)
        assert np.array_equal(whole.spans, parts.spans)
        assert whole.to_dict() == parts.to_dict()
