"""The legality check: planted mistakes are refused by name, and what passes never hangs the engine."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from strategies import H200, is_legal, record, shapes

from fasim.simulator.code.estimate import Estimate
from fasim.simulator.code.phase import Phase
from fasim.simulator.code.softmax import ONLINE, RUNNING
from fasim.simulator.errors import UsageError
from fasim.simulator.language.check import IllegalProgram, check
from fasim.simulator.language.program import Program, trace
from fasim.simulator.problem.tile import Tile
from fasim.simulator.problem.workload import Workload
from fasim.simulator.replay.engine import Deadlock, Memory, replay
from fasim.simulator.schedules import Kernel

MEMORY = Memory(l2=37.0, hbm=18.0, read_miss={}, write_through={})
random_programs = settings(
    max_examples=300, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


class Pingpong:
    """Pingpong with one mistake: at the block where `when` holds, the consumer or the producer does otherwise."""

    __name__ = "pingpong"

    def __init__(self, mistake: str = "", who: int = 0, block: int = 1, stages: int | None = None):
        self.mistake, self.who, self.block, self.stages = mistake, who, block, stages

    def __call__(self, cta, tile) -> None:
        K = cta.ring("K", tile.k_bytes, self.stages or tile.stages)
        V = cta.ring("V", tile.v_bytes, self.stages or tile.stages)
        Q = cta.ring("Q", tile.q_bytes, 1)
        O = cta.ring("O", tile.o_bytes, 1, over=V)
        turn, done = cta.baton(), cta.meeting()

        load = cta.producer()
        load.tma(Q[0])
        for j in tile.kv_blocks:
            load.tma(K[j])
            if j == 0 and self.mistake != "V over O":
                load.reclaim(O[0])
            if not self._makes("no load of V", j):
                load.tma(V[j])
            if self._makes("second load of V", j):
                load.tma(V[j])

        for wg in cta.consumers():
            wg.wait(Q[0])
            for j in tile.kv_blocks:
                self._block(wg, turn, K, V, j)
            wg.free(Q[0])
            wg.normalize()
            if self.mistake != "no meeting":
                wg.meet(done)
            wg.store("O", slot=O[0])

    def _makes(self, mistake: str, j: int, wg=None) -> bool:
        return mistake == self.mistake and j == self.block and (wg is None or wg.rank == self.who)

    def _block(self, wg, turn, K, V, j) -> None:
        def makes(mistake: str) -> bool:
            return self._makes(mistake, j, wg)

        if makes("early give"):
            wg.give(turn)
        if not makes("no take"):
            wg.take(turn)
        S = wg.gemm("S", "Q", K[j])
        if makes("softmax before S"):
            wg.softmax(j)
        if makes("early free of K"):
            wg.free(K[j])
        wg.wait(S)
        if not makes("no free of K") and not makes("early free of K"):
            wg.free(K[j])
        if makes("second free of K"):
            wg.free(K[j])
        if makes("read of K after its free"):
            wg.wait(wg.gemm("S", "Q", K[j]))
        wg.softmax(j)
        if makes("free of V before it is loaded"):
            wg.free(V[j])
        PV = wg.gemm("O", "P", V[j], add=True)
        if not makes("no give") and not makes("early give"):
            wg.give(turn)
        if makes("second give"):
            wg.give(turn)
        if makes("rescale under PV"):
            wg.compute("rescale O", Phase(fma=8), j, writes=("O",))
        wg.wait(PV)
        wg.free(V[j])


def program(schedule, loops=((4, 0), (4, 0)), stages: int = 2, persistent: bool = True, softmax=ONLINE) -> Program:
    kernel = Kernel(schedule, "rows", persistent=persistent, code=Estimate(softmax, persistent))
    return trace(kernel, Workload(1, 1, 512, 128), Tile(128, 128, stages, 2), loops)


def refusal(schedule, **options) -> str:
    """The check's one sentence; the program must not get through."""
    with pytest.raises(IllegalProgram) as caught:
        check(program(schedule, **options))
    return str(caught.value)


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_the_schedule_without_a_mistake_is_legal(persistent, stages):
    check(program(Pingpong(), stages=stages, persistent=persistent))


PLANTED = {
    "no free of K": "deadlock: producer waits to load K[3], because WG1 has not freed K[1] (ring K has 2 stage(s))",
    "no give": "WG0 waits to take the turn, which no one gives",
    "no load of V": "WG0 waits for V[1], which no one loads",
    "second load of V": "over-full ring: producer loads V[1] into a stage of ring V (2 stage(s)) that still holds V[1]",
    "no take": "race: WG1 gives the turn, which it does not hold",
    "second give": "race: WG1 gives the turn, which it does not hold",
    "early give": "race: WG1 gives the turn, which it does not hold",
    "early free of K": "race: WG1 frees K[1] while its 'S=QK^T' may still read it",
    "second free of K": "race: WG1 frees K[1] twice",
    "free of V before it is loaded": "race: WG1 frees V[1] before it has waited for it",
    "read of K after its free": "race: WG1 issues 'S=QK^T' on K[1] after it has freed K[1]",
    "softmax before S": "race: WG1 does 'softmax' while its 'S=QK^T' on K[1] may still run",
    "rescale under PV": "race: WG1 does 'rescale O' while its 'O+=PV' on V[1] may still run",
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_refused_naming_warp_verb_and_buffer(mistake):
    sentence = refusal(Pingpong(mistake, who=1))
    assert PLANTED[mistake] in sentence


@pytest.mark.parametrize("mistake", [m for m in PLANTED if m not in ("no load of V", "second load of V")])
@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("block", [0, 3])
def test_a_mistake_of_either_warpgroup_at_either_end_is_refused(mistake, who, block):
    """The message may then be another one: a mistake in the first block hangs elsewhere than one in the last."""
    sentence = refusal(Pingpong(mistake, who, block))
    assert re.search(r"producer|WG[01]", sentence) and re.search(r"[KVQO]\[\d\]|turn", sentence)


def test_what_is_held_at_the_end_is_a_leak():
    assert refusal(Pingpong("no free of K", who=1, block=3), loops=[(4, 0)]) == "leak: WG1 never frees K[3]"


def test_a_turn_kept_at_the_end_is_a_leak():
    sentence = refusal(Pingpong("no give", who=1, block=3), loops=[(4, 0)])
    assert sentence == "leak: WG1 takes the turn 4 times and gives it 3 times"


def test_a_ring_of_the_wrong_depth_is_named_with_its_depth():
    """Holding K of the block before while asking for the next needs two stages."""

    def two_at_once(cta, tile):
        K = cta.ring("K", tile.k_bytes, tile.stages)
        load = cta.producer()
        for j in tile.kv_blocks:
            load.tma(K[j])
        for wg in cta.consumers():
            for j in tile.kv_blocks:
                wg.wait(wg.gemm("S", "Q", K[j]))
                for before in tile.kv_blocks[:j][-1:]:
                    wg.free(K[before])
            wg.free(K[tile.loop - 1])

    check(program(two_at_once, stages=2))
    assert "have not freed K[0] (ring K has 1 stage(s))" in refusal(two_at_once, stages=1)


def test_weights_may_be_converted_under_a_product_that_reads_the_other_set_alone():
    def overlapped(blocks):
        def schedule(cta, tile):
            K, V = (cta.ring(name, tile.k_bytes, 2) for name in "KV")
            load = cta.producer()
            for j in tile.kv_blocks:
                load.tma(K[j])
                load.tma(V[j])
            for wg in cta.consumers():
                for j in tile.kv_blocks:
                    wg.wait(wg.gemm("S", "Q", K[j]))
                    wg.free(K[j])
                PV = wg.gemm("O", "P", V[0], add=True)
                for j in blocks:
                    wg.softmax(j)
                wg.wait(PV)
                wg.wait(wg.gemm("O", "P", V[1], add=True))
                for j in tile.kv_blocks:
                    wg.free(V[j])

        return schedule

    check(program(overlapped([1]), loops=[(2, 0)], softmax=RUNNING))
    check(program(overlapped([0, 1]), loops=[(2, 0)], softmax=ONLINE))  # which leaves P alone
    sentence = refusal(overlapped([0]), loops=[(2, 0)], softmax=RUNNING)
    assert sentence == "race: WG0 does 'softmax' while its 'O+=PV' on V[0] may still run; wait for it first"


@pytest.mark.parametrize("persistent", [True, False])
def test_leaving_without_waiting_for_a_gemm_is_a_race(persistent):
    def leaves(cta, tile):
        V = cta.ring("V", tile.v_bytes, 2)
        cta.producer().tma(V[0])
        for wg in cta.consumers():
            wg.gemm("O", "P", V[0], add=True)

    sentence = refusal(leaves, loops=[(1, 0)] * 2, persistent=persistent)
    assert sentence == "race: WG0 exits without waiting for its 'O+=PV' on V[0]"


def test_a_gemm_left_running_under_the_output_is_a_race():
    def unfinished(cta, tile):
        V = cta.ring("V", tile.v_bytes, 1)
        cta.producer().tma(V[0])
        for wg in cta.consumers():
            wg.gemm("O", "P", V[0], add=True)
            wg.store("O")

    assert refusal(unfinished, loops=[(1, 0)]).startswith(
        "race: WG0 does 'stage O' while its 'O+=PV' on V[0] may still run"
    )


def test_loading_into_a_held_stage_is_an_over_full_ring():
    def twice(cta, tile):
        K = cta.ring("K", tile.k_bytes, 2)
        load = cta.producer()
        load.tma(K[0])
        load.tma(K[0])
        for wg in cta.consumers():
            wg.wait(K[0])
            wg.free(K[0])

    sentence = refusal(twice, loops=[(1, 0)])
    assert sentence == "over-full ring: producer loads K[0] into a stage of ring K (2 stage(s)) that still holds K[0]"


def test_loading_over_a_staged_output_is_a_race_in_a_persistent_kernel():
    sentence = refusal(Pingpong("V over O"))
    assert sentence.startswith("race: producer loads V[0] over O[0], which may not have left shared memory")
    check(program(Pingpong("V over O"), loops=[(4, 0)]))
    check(program(Pingpong("V over O"), persistent=False))


def test_staging_the_output_over_what_others_may_still_read_is_a_race():
    sentence = refusal(Pingpong("no meeting"))
    assert sentence == "race: WG0 stages O over V[2], which WG1 may still read; let the consumers meet first"


def test_a_meeting_that_one_consumer_misses_is_a_deadlock():
    def late(cta, tile):
        done = cta.meeting()
        for wg in cta.consumers()[:-1]:
            wg.meet(done)

    assert refusal(late, loops=[(1, 0)]) == "deadlock: WG0 waits to meet the other consumers, of whom one never comes"


def test_a_load_that_no_one_waits_for_is_a_leak():
    def unread(cta, tile):
        cta.producer().tma(cta.ring("K", tile.k_bytes, 1)[0])
        for wg in cta.consumers():
            wg.store("O")

    assert refusal(unread, loops=[(1, 0)]) == "leak: K[0] is loaded and no warp waits for it"


def test_a_refusal_is_an_error_for_the_user():
    assert issubclass(IllegalProgram, UsageError)


@random_programs
@given(shapes(), st.integers(0, 4), st.integers(1, 8))
def test_what_the_check_accepts_never_deadlocks(shape, arbitration, depth):
    recorded = record(shape)
    assume(is_legal(recorded))
    device = replace(H200, wgmma_arbitration_ksteps=arbitration, wgmma_queue_ksteps=depth)
    assert replay([recorded], device, MEMORY).cycles > 0


@random_programs
@given(shapes(forget=0.03))
def test_the_check_calls_deadlock_exactly_what_hangs_the_engine(shape):
    """Programs with verbs left out at random: a race or a leak may also run to its end, a deadlock never does."""
    recorded = record(shape)
    try:
        check(recorded)
        verdict = "legal"
    except IllegalProgram as error:
        verdict = str(error).split(":")[0]
    assume(verdict not in ("race", "over-full ring"))
    try:
        replay([recorded], H200, MEMORY)
        hung = False
    except Deadlock:
        hung = True
    assert hung == (verdict == "deadlock")
