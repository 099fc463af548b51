"""The backward's in-kernel trace: stamps become spans in order of time, and a block's phases add up."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import fasim
from fasim.simulator.errors import UsageError
from fasim.traces.gradient_trace import LABELS, STAMPS, phases, recording
from fasim.traces.kernel_trace import BLOCKS, ROWS, SLOTS

ORDER = tuple(
    "SCORES SCORES_DONE PROBABILITIES PRODUCTS VALUES PRODUCTS_DONE GRADIENT PUT_GRADIENT KEYS KEYS_DONE".split()
)  # fmt: skip
SLOT = {name: number for number, name in enumerate(STAMPS)}


def stamped(blocks: int = 12, tiles: int = 2, clock: int = 2**32 - 3000) -> np.ndarray:
    """Two warpgroups that stamp ORDER in every block, 10 cycles further each time; a STORE ends a tile."""
    words = np.zeros((1, ROWS, BLOCKS, SLOTS), np.uint32)
    for rank in range(2):
        now = clock + 5 * rank
        for block in range(blocks * tiles):
            for number, name in enumerate(ORDER):
                now += 10 * (number + 1)
                words[0, 1 + rank, block, SLOT[name]] = now % 2**32
        for tile in range(tiles):
            last = (tile + 1) * blocks - 1
            words[0, 1 + rank, last, SLOT["STORE"]] = (int(words[0, 1 + rank, last, SLOT["KEYS_DONE"]]) + 3) % 2**32
    return words


def test_the_slots_are_the_enums_of_the_header():
    header = (Path(fasim.__file__).parent / "kernels" / "cuda" / "backward" / "gradients.cuh").read_text(encoding="utf-8")
    enum = re.search(r"enum class Stamp : u32 \{([^}]*)\}", header)[1]
    assert [name.strip() for name in enum.split(",")] == list(STAMPS) and len(STAMPS) <= SLOTS


def test_spans_are_in_order_of_time_over_a_wrap_of_the_clock_and_phases_add_up_to_the_block():
    found = recording(stamped(), [0], consumers=2)
    assert [lane.name for lane in found.lanes] == ["CTA0 WG0", "CTA0 WG1"]
    for number in range(2):
        spans = found.spans[found.spans["lane"] == number]
        assert (spans["start"][1:] == spans["end"][:-1]).all() and (np.diff(spans["end"]) > 0).all()
        assert spans["end"][0] == 5 * number and set(spans["tile"]) == {0, 1} and spans["step"].max() == 11
    table = phases(found)["CTA0 WG0"]
    assert [label for label, _ in table[:-1]] == [STAMPS[name] for name in ORDER]
    assert [cycles for _, cycles in table[:-1]] == [10.0 * (number + 1) for number in range(len(ORDER))]
    assert table[-1] == ("whole block", 550.0)
    assert set(found.labels) == set(LABELS)


def test_what_is_no_trace_is_refused_in_one_sentence():
    with pytest.raises(UsageError, match="a trace buffer is"):
        recording(np.zeros((1, 2, 3, 4), np.uint32), [0], 2)
    with pytest.raises(UsageError, match="CTA 0 left no stamp of warpgroup 0"):
        recording(np.zeros((1, ROWS, BLOCKS, SLOTS), np.uint32), [0], 2)


def test_a_kernel_that_is_wrong_is_left_out_of_all_that_follows_and_time_is_kept(tmp_path):
    from fasim.kernels.measure import session_backward as session

    seen = []

    def pretend(step, seconds, out):
        seen.append((step.name, seconds))
        wrong = {"relay-d256-deterministic": 1, "apart-d64": 1}
        said = [" ".join(command) for command in step.commands.values()]
        assert step.name == "check" or not any("relay" in each or "apart --head-dim 64" in each for each in said)
        return session.Outcome(step.name, 1.0, {name: wrong.get(name, 0) for name in step.commands})

    done = session.session(session.KERNELS, tmp_path, tmp_path / "plan.toml", 100, do=pretend)
    assert [name for name, _ in seen][:2] == ["check", "pace"] and "timeline-apart-d128" in dict(seen)
    assert all(given <= 100 for _, given in seen) and (tmp_path / "session.json").exists()
    assert not session.session(session.KERNELS, tmp_path, tmp_path / "plan.toml", 1, only=("pace",), do=pretend)[0].seconds
    assert len(done) == len(seen)
