"""fasim validate --kind varlen and --kind decode: right kernels pass, each planted fault is rejected in words that name it."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from fasim.kernels.validation import suite  # noqa: E402
from fasim.kernels.validation.decode import mutants as of_parts  # noqa: E402
from fasim.kernels.validation.precision import subjects_of  # noqa: E402
from fasim.kernels.validation.varlen import mutants as of_packing  # noqa: E402
from fasim.kernels.validation.varlen import subjects as packed_subjects  # noqa: E402
from fasim.simulator.errors import UsageError  # noqa: E402

MUTANTS = [("varlen", mutant) for mutant in of_packing.MUTANTS] + [("decode", mutant) for mutant in of_parts.MUTANTS]


@pytest.fixture(scope="module")
def tables():
    return {kind: suite.self_test(kind=kind) for kind in ("varlen", "decode")}


@pytest.mark.parametrize("kind", ["varlen", "decode"])
def test_the_right_kernel_passes(tables, kind):
    report = tables[kind].correct
    assert report.passed, [f"{check.case}: {check.message}" for check in report.failures]
    assert len(report.checks) > 25 and f"--kind {kind}" in report.options


@pytest.mark.parametrize(("kind", "mutant"), MUTANTS, ids=[f"{kind}-{mutant.name}" for kind, mutant in MUTANTS])
def test_each_planted_fault_is_rejected_in_words_that_name_it(tables, kind, mutant):
    failures = tables[kind].reports[mutant.name].failures
    assert any(mutant.caught(check) for check in failures), [f"{check.case}: {check.message}" for check in failures]


@pytest.fixture
def module(monkeypatch):
    made = types.ModuleType("users_packed")
    made.right = of_packing.TiledPacked()
    made.dense = lambda q, k, v, causal, softmax_scale: None
    monkeypatch.setitem(sys.modules, "users_packed", made)


def test_a_users_callable_is_called_with_its_lengths_by_name_and_in_a_batch_of_one_length(module):
    given = {"device": "cpu", "kind": "varlen", "quick": True, "head_dims": (32,)}
    right = replace(packed_subjects.resolve("users_packed:right"), tile=16, slow=True)
    report = suite.validate(right, only=("determinism",), **given)
    assert report.passed, [f"{check.case}: {check.message}" for check in report.failures]
    with pytest.raises(UsageError, match="cu_seqlens_q"):
        suite.validate("users_packed:dense", **given)


def test_a_batch_of_one_length_is_packed_and_unpacked():
    q, k, v = (torch.randn(3, length, 2, 16, dtype=torch.float64) for length in (5, 7, 7))
    subject = packed_subjects.packed_subject("tiled", of_packing.TiledPacked())
    o, lse = subject.forward(q, k, v, causal=True)
    expected, expected_lse = of_packing.TiledAttention()(q, k, v, causal=True)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_kinds_and_names_that_are_none_are_refused():
    with pytest.raises(UsageError, match="--kind 'varlens' is not possible: give one of dense, varlen, decode"):
        subjects_of("fp16", "varlens")
    with pytest.raises(UsageError, match="--kind decode is for fp16, bf16, fp32 and fp64"):
        suite.self_test(dtype="e4m3", kind="decode")
    with pytest.raises(UsageError, match="no kernel of packed sequences is called 'fa1': give one of fa2, fa3"):
        subjects_of("bf16", "varlen").look_up("fa1")
    with pytest.raises(UsageError, match="no kernel of few queries is called 'fa3': give decode"):
        subjects_of("bf16", "decode").look_up("fa3")


def test_ours_say_what_they_promise():
    pytest.importorskip("triton")
    for kind, names in (("varlen", ("fa2", "fa3")), ("decode", ("decode",))):
        room = subjects_of("bf16", kind)
        assert names == room.OURS
        for name in names:
            subject = room.resolve(name)
            assert subject.head_dims == (64, 128, 256) and all(path.exists() for path in subject.sources) and subject.source_sha256


@pytest.mark.parametrize(("kind", "name", "least"), [("decode", "decode", 12), ("varlen", "fa2", 8)])
def test_what_the_sanitizer_is_put_around_calls_the_kernel_of_its_kind(kind, name, least, monkeypatch):
    """The calls alone: right or not is for the suite to say."""
    pytest.importorskip("triton")
    from fasim.kernels.validation import sanitize
    from fasim.kernels.validation.exercise import exercise

    monkeypatch.setattr(sanitize, "require", lambda: "compute-sanitizer")
    command = sanitize.command("memcheck", name, "bf16", 0, kind)
    assert command[command.index("--exercise") + 1] == name and command[command.index("--kind") + 1] == kind
    room, made = subjects_of("bf16", kind), []
    right = of_packing.TiledPacked() if kind == "varlen" else of_parts.correct()

    def resolve(asked, device):
        made.append(asked)
        return packed_subjects.packed_subject(asked, right, tile=16, head_dims=(32,)) if kind == "varlen" else right

    monkeypatch.setattr(room, "resolve", resolve)
    assert exercise(name, "bf16", kind=kind, device="cpu") >= least // 2 and made == [name]


def test_what_the_sanitizer_is_put_around_takes_every_head_dim(monkeypatch):
    from fasim.kernels.validation import exercise as room

    taken = []
    monkeypatch.setitem(room._CALLS, "decode", lambda bench, head_dim: [lambda: taken.append(head_dim)])
    assert room.exercise("decode", "bf16", kind="decode", device="cpu") == 3 and taken == [64, 128, 256]


def test_a_callable_without_a_page_table_is_not_asked_for_pages(module):
    right = of_parts.correct().forward
    sys.modules["users_packed"].few = lambda q, k, v, causal, softmax_scale, num_splits=1: right(q, k, v, causal=causal)
    sys.modules["users_packed"].pages = lambda q, k, v, causal, softmax_scale, num_splits, cache_seqlens=None, page_table=None: None
    room = subjects_of("bf16", "decode")
    assert room.resolve("users_packed:few").pages is None and room.resolve("users_packed:pages").pages is not None
    report = suite.validate("users_packed:few", device="cpu", kind="decode", quick=True, only=("pages",), head_dims=(32,))
    asked = [check for check in report.checks if check.group == "pages"]
    assert len(asked) > 8 and all((check.verdict, check.message) == ("skip", "takes no page table") for check in asked)
