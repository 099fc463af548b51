"""A walk over the tiles of S: its bytes are the prediction's, it visits what the schedule visits, and it plays in a terminal."""

from __future__ import annotations

import io
import json
from contextlib import nullcontext

import pytest

from fasim.cli.terminal import Terminal
from fasim.cli.walk import evenly, play
from fasim.simulator.errors import UsageError
from fasim.simulator.predict import default_tile, laid_out, predict
from fasim.simulator.problem.workload import Workload
from fasim.simulator.results.run import Bytes
from fasim.traces.walk import LEVELS, Walk, walk

SCHEDULES = ("standard", "fa1", "fa1-published", "fa2", "fa3", "fa3-published")


def moved(found: Walk) -> dict[str, Bytes]:
    """The bytes of all steps, tensor by tensor."""
    sums: dict[str, dict[str, int]] = {}
    for step in found.steps:
        for move in step.moves:
            way, mine = "write" if move.written else "read", sums.setdefault(move.tensor, {})
            for name, size in (("algorithmic", move.sram), ("l2", move.l2), ("hbm", move.hbm)):
                mine[f"{name}_{way}"] = mine.get(f"{name}_{way}", 0) + size
    return {tensor: Bytes(**fields) for tensor, fields in sums.items()}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", [(1, 1, 1024), (1, 4, 500)])
def test_the_bytes_of_all_steps_are_those_of_the_prediction(schedule, causal, shape):
    work = Workload(*shape, head_dim=128, kv_heads=max(1, shape[1] // 2), causal=causal)
    found = walk(work, schedule, "h100-sxm")
    traffic = laid_out(work, schedule, "h100-sxm").traffic
    assert moved(found) == traffic.by_tensor
    read, written = traffic.total("hbm_read"), traffic.total("hbm_write")
    inward = (read, traffic.total("l2_read"), sum(step.registers for step in found.steps))
    assert found.so_far[-1] == (*inward, traffic.total("l2_write"), written)


@pytest.mark.parametrize("schedule", ["fa2", "fa3", "fa1-published"])
@pytest.mark.parametrize("lengths", [(333, 100), (100, 900), (1, 257)])
def test_so_they_are_where_lengths_differ_and_rows_see_no_key(schedule, lengths):
    work = Workload(1, 2, seqlen_q=lengths[0], seqlen_k=lengths[1], head_dim=64, causal=True)
    assert moved(walk(work, schedule, "h200")) == laid_out(work, schedule, "h200").traffic.by_tensor


def test_what_predict_prints_is_what_the_walk_sums_up():
    work = Workload(1, 1, 1024, head_dim=128)
    run = predict(work, "fa2", "h200")
    found = walk(work, "fa2", "h200")
    assert moved(found) == run.traffic.by_tensor
    through = sum(move.sram for step in found.steps for move in step.moves)
    staged = work.tensor_bytes["O"]  # O passes from registers to shared memory before it leaves
    assert found.so_far[-1][LEVELS.index("SRAM to registers")] + through + staged == run.traffic.smem_bytes


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_kernel_visits_every_tile_that_has_something_to_see_once(schedule, causal):
    work = Workload(1, 2, 500, head_dim=128, causal=causal)
    found = walk(work, schedule, "h100-sxm")
    tile = default_tile(work, schedule)
    for kernel in {step.kernel for step in found.steps[:-1]}:
        places = [(step.head, step.row, step.column) for step in found.steps if step.kernel == kernel and step.row is not None]
        seen = {
            (head, m, n)
            for head in range(2) for m in range(found.rows) for n in range(found.columns)
            if not causal or schedule == "standard" or n * tile.block_n < (m + 1) * tile.block_m
        }  # fmt: skip
        assert len(places) == len(set(places))
        assert set(places) == seen


def test_the_order_is_the_schedules_own():
    work = Workload(1, 1, 512, head_dim=128)
    along, under = (walk(work, name, "h100-sxm").steps for name in ("fa2", "fa1"))
    assert [(s.row, s.column) for s in along[:9]] == [(0, n) for n in reversed(range(8))] + [(1, 7)], "from the last block on"
    assert [(s.row, s.column) for s in under[:5]] == [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1)]
    assert {move.tensor for move in under[1].moves} == {"Q", "O", "l", "m"}, "K and V stay"
    assert {move.tensor for move in along[1].moves} == {"K", "V"}, "Q stays"


def test_keys_that_no_query_of_a_cta_sees_are_loaded_and_said_so(fasim):
    work = Workload(1, 1, 512, head_dim=128, causal=True)
    blind = [step for step in walk(work, "fa1-published", "h100-sxm").steps[:-1] if step.row is None]
    assert blind and all({move.tensor for move in step.moves} == {"K", "V"} and not step.registers for step in blind)
    out = fasim("walk", "fa1-published", "--seqlen", "512", "--causal", "--frames", "99")[1]
    assert out.count("no query of its CTA sees a key here") == len(blind)


def test_in_a_cluster_one_cta_loads_for_both():
    steps = walk(Workload(1, 1, 1024, head_dim=128), "fa3-published", "h100-sxm").steps
    first, second = (next(step for step in steps if step.row == row) for row in (0, 1))
    assert all(move.l2 for move in first.moves)
    assert {move.tensor for move in second.moves if not move.l2} == {"K", "V"}
    assert all(move.sram for move in second.moves)


@pytest.mark.parametrize("work", [Workload(4, 16, 8448), Workload(1, 1, 65536)])
def test_a_walk_that_nobody_would_look_at_is_refused(work):
    with pytest.raises(UsageError, match="is walked in some"):
        walk(work, "fa2", "h100-sxm")


def test_a_walk_that_would_overflow_l2_is_refused():
    with pytest.raises(UsageError, match="stays in L2"):
        walk(Workload(1, 1, 3000), "standard", "h100-sxm")


def test_a_backward_is_no_walk_over_s_tile_by_tile():
    with pytest.raises(UsageError, match="backward"):
        walk(Workload(1, 1, 512, direction="backward"), "fa2", "h100-sxm")


# -- the command ----------------------------------------------------------------------------------------------------------


def test_steps_are_printed_within_eighty_columns_without_a_terminal(fasim, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for tokens in (("fa1", "--causal"), ("standard", "--seqlen", "2000"), ("fa2", "--seqlen-q", "128", "--seqlen-k", "8000")):
        status, out, err = fasim("walk", *tokens, "--frames", "3")
        assert status == 0 and out.count("so far") == 3 and not err, err
        assert max(map(len, out.splitlines())) <= 80 and "\x1b" not in out
    assert "L2 writes back" in out.split("step ")[-2]


def test_json_has_every_step_and_the_sums(fasim):
    status, out, _ = fasim("walk", "fa1", "--seqlen", "512", "--json")
    told = json.loads(out)
    assert status == 0 and len(told["steps"]) == 4 * 4 + 1
    assert told["total_bytes"]["HBM to L2"] == sum(m["hbm_bytes"] for s in told["steps"] for m in s["moves"] if m["way"] == "read")
    assert fasim("timeline", "fa1", "--step", "--seqlen", "512", "--json")[1] == out


@pytest.mark.parametrize(
    "tokens",
    [("walk", "--frames", "0"), ("walk", "--pace", "0"), ("walk", "fa9"), ("walk", "--heads", "4000"),
     ("timeline", "fa2", "fa3", "--step"), ("timeline", "--step", "--svg", "x.svg")],
)  # fmt: skip
def test_what_is_not_possible_is_one_sentence(tokens, fasim):
    status, out, err = fasim(*tokens)
    assert status == 2 and not out and err.startswith("fasim: ") and err.count("\n") == 1


def test_frames_are_spread_from_the_first_step_to_the_last():
    assert evenly(129, 5) == [0, 32, 64, 96, 128]
    assert evenly(3, 5) == [0, 1, 2]
    assert evenly(9, 1) == [0]


class Pressed:
    """A reader who presses these keys; None is a key that does not come in time."""

    def __init__(self, *keys: str | None):
        self.keys = list(keys)

    def listening(self):
        return nullcontext(True)

    def key(self) -> str:
        return self.keys.pop(0) or "q"

    def within(self, seconds: float) -> str | None:
        assert 0 < seconds < 10
        return self.keys.pop(0)


@pytest.mark.parametrize(
    ("keys", "last"),
    [((None, None, "q"), 3), ((" ", "n", "n", "p", "q"), 2), ((None,) * 16 + ("q",), 17), (("p", "p", "q"), 1),
     (("n",) * 30 + ("q",), 17)],
)  # fmt: skip
def test_a_walk_plays_stops_and_steps(keys, last):
    screen = io.StringIO()
    console = Terminal(file=screen, width=80, height=40, force_terminal=True, color_system=None, highlight=False)
    pressed = Pressed(*keys)
    play(console, walk(Workload(1, 1, 512, head_dim=128), "fa1", "h100-sxm"), pressed, 5.0)
    assert not pressed.keys
    shown = [line for line in screen.getvalue().splitlines() if "step " in line and " of 17" in line]
    assert f"step {last} of 17" in shown[-1]


def test_a_walk_fits_a_low_screen():
    screen = io.StringIO()
    console = Terminal(file=screen, width=60, height=20, force_terminal=True, color_system=None, highlight=False)
    play(console, walk(Workload(1, 1, 4096, head_dim=128), "fa1", "h100-sxm"), Pressed(*["n"] * 20, "q"), 5.0)
    last = screen.getvalue().split("step 21 of")[-1]
    assert "##" in last.split("now")[0] and "q leaves" in last
