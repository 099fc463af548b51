"""Every planted fault is rejected by the group that must, in words that name it; no group can be left out."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from processes import have_ended  # noqa: E402

from fasim.kernels.validation import mutants, subjects, suite  # noqa: E402
from fasim.kernels.validation.check import Check  # noqa: E402
from fasim.kernels.validation.report import Report  # noqa: E402
from fasim.simulator.errors import UsageError  # noqa: E402

ALONE = (
    "half accumulator", "nan swallowed", "sampled cache", "random order", "lse gradient dropped", "last call kept",
    "switches determinism on", "inference groups",
)  # fmt: skip
"""For each group a planted fault that it alone rejects: these are held to every group, the others to the one that must reject
them."""


@pytest.fixture(scope="module")
def alone():
    """The faults that only one group sees, and the correct kernel, against every group, on the CPU."""
    random.seed(0)
    return suite.self_test(device="cpu", seed=0, mutants=[mutant for mutant in mutants.MUTANTS if mutant.name in ALONE])


@pytest.fixture(scope="module")
def table(alone):
    """Every planted fault against the group that must reject it."""
    known = {}

    def held(mutant):
        one = {"only": [mutant.group], "enough": mutant.caught, "known": known}
        return suite.validate(mutant.subject(), device="cpu", seed=0, quick=True, **one)

    random.seed(0)
    reports = {mutant.name: alone.reports.get(mutant.name) or held(mutant) for mutant in mutants.MUTANTS}
    return replace(alone, reports=reports, mutants={mutant.name: mutant for mutant in mutants.MUTANTS})


def test_the_correct_kernel_passes(alone):
    assert alone.correct.passed, [check.message for check in alone.correct.failures]
    assert len(alone.correct.checks) > 90 and not alone.correct.idle


def test_there_are_enough_mutants_and_each_describes_itself():
    assert len(mutants.MUTANTS) >= 12
    assert len({mutant.name for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS)
    assert all(mutant.fault.endswith(".") and mutant.group in suite.GROUPS for mutant in mutants.MUTANTS)


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_is_killed_by_a_check_that_names_what_is_wrong(table, mutant):
    failed = table.kills(mutant.name)[mutant.group]
    assert any(mutant.expects in f"{check.case}: {check.message}" for check in failed), [c.message for c in failed]
    assert all("inputs:" in check.message for check in failed if "raised" not in check.message), failed


@pytest.mark.parametrize("group", suite.GROUPS)
def test_without_any_one_group_a_mutant_lives(alone, group):
    (only,) = alone.only_by(group)
    assert alone.mutants[only].group == group
    assert {check.group for check in alone.reports[only].checks} >= set(suite.GROUPS)  # all have been asked


def test_the_kill_table_as_data(table):
    found = table.to_dict()
    assert found["schema"] == "fasim.validation.self-test/2" and found["verdict"] == "pass"
    assert all(row["killed"] and row["message"] for row in found["mutants"])
    json.dumps(found, allow_nan=False)


def test_a_mutant_that_lives_or_a_correct_kernel_that_dies_fails_the_self_test():
    (dropped,) = (mutant for mutant in mutants.MUTANTS if mutant.name == "lse gradient dropped")
    alive = suite.self_test(only=["determinism"], mutants=[dropped])
    assert not alive.passed and "lse gradient dropped" in alive.conclusion
    broken = suite.KillTable(["shapes"], Report("tiled attention", "CPU", "fp16", 0, True, [Check("shapes", "x", "fail", 0)]))
    assert not broken.passed and "correct kernel is rejected" in broken.conclusion


FEW = tuple(mutant for mutant in mutants.MUTANTS if mutant.group == "accuracy")[:3]


def test_two_processes_make_the_table_that_one_makes():
    one, two = (suite.self_test(only=["accuracy"], mutants=FEW, processes=n).to_dict() for n in (1, 2))
    assert [row["mutant"] for row in two["mutants"]] == [mutant.name for mutant in FEW]
    changing = ("seconds", "conclusion")  # the conclusion says the seconds
    assert {k: v for k, v in two.items() if k not in changing} == {k: v for k, v in one.items() if k not in changing}
    assert two["verdict"] == "pass"


def never_made():
    """A mutant that takes for ever."""
    time.sleep(120)


def no_kernel():
    """What a mutant cannot be made of."""
    raise UsageError("there is no such kernel")


def end_the_process():
    """A mutant that takes its process with it."""
    os._exit(3)


@pytest.fixture
def planted(monkeypatch):
    """A mutant of a function above, which another process finds by its name."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.setitem(sys.modules, "test_mutants", sys.modules[__name__])

    def of(kernel):
        monkeypatch.setattr(kernel, "__module__", "test_mutants")
        return mutants.Mutant(kernel, "determinism", "")

    return of


def test_an_interrupt_ends_the_processes_of_the_self_test(planted):
    before, started = set(multiprocessing.active_children()), []

    def interrupt(done, total, what):
        if done:
            started.extend(set(multiprocessing.active_children()) - before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        suite.self_test(only=["determinism"], mutants=[planted(never_made), FEW[0]], processes=2, advance=interrupt)
    assert started
    assert have_ended(started)


@pytest.mark.parametrize(("kernel", "words"), [(no_kernel, "no such kernel"), (end_the_process, "ended without an answer")])
def test_an_error_in_a_process_of_the_self_test_is_an_error(kernel, words, planted):
    with pytest.raises(UsageError, match=words):
        suite.self_test(only=["determinism"], mutants=[planted(kernel)], processes=2)


def test_a_number_of_processes_is_one_or_more():
    with pytest.raises(UsageError, match="give 1 or more"):
        suite.self_test(processes=0)


def test_self_test_shows_the_kill_table(fasim, table, monkeypatch):
    monkeypatch.setattr(suite, "self_test", lambda **_: table)
    status, out, _ = fasim("validate", "--self-test")
    assert status == 0
    said = " ".join(out.split())
    assert all(word in said for mutant in mutants.MUTANTS for word in mutant.name.split()), "a long name takes two lines"
    assert "only determinism rejects: random order" in said and "planted faults rejected" in said
    status, out, _ = fasim("validate", "--self-test", "--json")
    assert status == 0 and json.loads(out) == json.loads(json.dumps(table.to_dict()))


class CutByBatch(mutants.TiledAttention):
    """Right, and with other bits where the batch is larger: the last K/V tile comes first."""

    def forward(self, q, *rest):
        self.turned = q.shape[0] > 1
        return super().forward(q, *rest)

    def kv_tiles(self, *where):
        tiles = super().kv_tiles(*where)
        return tiles[::-1] if self.turned else tiles


def test_other_bits_in_another_batch_are_a_note():
    report = suite.validate(mutants.subject("cut by batch", CutByBatch()), device="cpu", quick=True, only=["determinism"])
    assert report.passed
    assert all("not batch invariant" in note.message for note in report.notes)
    assert {note.case for note in report.notes} >= {"batch of 3 and one by one, causal"}


FAULTS = Path(suite.__file__).parents[3] / "shared" / "faults" / "attention_faults.py"
WRONG = {
    "KvStridesSwapped": ("shapes", "on K read with V's strides and V with K's"),
    "LseGradIgnored": ("gradients", "it lacks the gradient of LSE"),
    "NegativeScale": ("shapes", "softmax_scale -0.3"),
    "GroupsBeyondEight": ("shapes", "with key head 0 for every query head"),
    "BackwardEatsLse": ("autograd", "backward modifies LSE"),
    "MaskWrapsAt32k": ("shapes", "wrapped at 32768"),
    "MidBatchBackward": ("gradients", "batches 1, 2 are 1.5 times what it should be"),
    "BackwardStrides": ("gradients", "a backward pass on memory read as if it were contiguous"),
    "BackwardOverwritten": ("autograd", "they share a buffer"),
    "EmptyBackward": ("gradients", "gradients of an empty problem are empty or 0"),
}
"""Wrong kernels for the CPU that lie beside the repository: the group that rejects each, and its words."""


@pytest.mark.skipif(not FAULTS.exists(), reason="../shared/faults is not here")
@pytest.mark.parametrize("name", [None, *WRONG])
def test_wrong_kernels_beside_the_repository_are_named_and_the_correct_one_passes(name, monkeypatch):
    monkeypatch.syspath_prepend(FAULTS.parent)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        group, words = WRONG.get(name, ("autograd", ""))
        subject = subjects.resolve(f"attention_faults:{name or 'correct'}", "cpu")

        def named(check: Check) -> bool:
            return name is not None and check.verdict == "fail" and words in f"{check.case}: {check.message}"

        report = suite.validate(subject, device="cpu", quick=True, only=[group], enough=named)
    finally:
        torch.set_num_threads(threads)
        sys.modules.pop("attention_faults", None)
    said = [f"{check.case}: {check.message}" for check in report.failures]
    assert report.passed if name is None else any(words in each for each in said), said
