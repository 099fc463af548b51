"""FlashAttention-3's own tests in our functions' hands: their interface, which cases are asked, and what is said of them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

_spec = importlib.util.spec_from_file_location("triton_env", Path(__file__).with_name("triton_env.py"))
env = sys.modules.setdefault("triton_env", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(env)

import torch  # noqa: E402

from fasim.kernels import reference  # noqa: E402
from fasim.kernels.validation import upstream  # noqa: E402


def test_their_interface_is_ours_and_refuses_what_ours_has_not():
    theirs = upstream.interface()
    q, k, v, _ = env.inputs(2, 4, 2, 1, 20, 64)
    lengths = torch.tensor([20, 20], dtype=torch.int32, device=env.DEVICE)
    usual = {"qv": None, "window_size": [-1, -1], "attention_chunk": 0, "scheduler_metadata": None, "rotary_cos": None}
    asked = {"cache_seqlens": lengths, "num_splits": 0, "return_softmax_lse": True}
    o, lse, *_ = theirs.flash_attn_with_kvcache(q, k, v, None, None, **asked, **usual)
    expected = reference.attention_forward(q, k, v)
    assert env.relative_error(o, expected.o) < 1e-3 and env.relative_error(lse, expected.lse) < 1e-4
    cu_q, cu_k = (torch.tensor([0, n, 2 * n], dtype=torch.int32, device=env.DEVICE) for n in (1, 20))
    packed = (*(x.flatten(0, 1) for x in (q, k, v)), cu_q, cu_k, 1, torch.tensor(20))
    o = theirs.flash_attn_varlen_func(*packed, seqused_k=lengths, pack_gqa=False, softcap=0.0)
    assert env.relative_error(o.unflatten(0, (2, 1)), expected.o) < 1e-3
    for given in ({"seqused_k": lengths - 1}, {"window_size": (5, 0)}, {"softcap": 15.0}, {"qv": q}):
        with pytest.raises(NotImplementedError, match=next(iter(given))[:7]):
            theirs.flash_attn_varlen_func(*packed, **given)


@pytest.mark.parametrize("deterministic", [False, True])
def test_their_race_test_runs_in_either_mode_of_the_backward(monkeypatch, deterministic):
    asked = []
    monkeypatch.setattr("fasim.kernels.ops.flash_attn_func", lambda *args, **given: asked.append(given["deterministic"]))
    upstream.interface(deterministic).flash_attn_func(1, 2, 3, causal=True)
    assert asked == [deterministic] and upstream.TESTS["race"] == "test_flash_attn_race_condition"


def test_what_ours_has_not_is_not_asked_and_the_rest_is_counted():
    class Case:
        def __init__(self, name, number, **params):
            self.originalname, self.callspec, self.nodeid = name, SimpleNamespace(params=params), f"file::{name}[{number}]"

    asked = upstream.TESTS["varlen"]
    items = [Case(asked, i, seqlen_q=length, seqlen_k=9) for i, length in enumerate((3, 5, 7))]
    others = [Case(asked, 8, has_qv=True), Case(asked, 9, seqlen_k=4096), Case("test_flash_attn_race_condition", 0)]
    others.append(Case(asked, 10, d=96))
    run, dropped = upstream.Run([asked], 60, 100, 0, (0, 1)), []
    config = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: dropped.extend(items)))
    wanted = [*items, *others]
    run.pytest_collection_modifyitems(config, wanted)
    assert {each.nodeid for each in wanted} == {each.nodeid for each in items} and len(dropped) == 4
    crash = SimpleNamespace(reprcrash=SimpleNamespace(message="AssertionError: too far\nand more"))
    for each, failed in zip(items[:2], (False, True), strict=True):
        outcome = "failed" if failed else "passed"
        about = {"when": "call", "outcome": outcome, "failed": failed, "nodeid": each.nodeid, "longrepr": crash}
        run.pytest_runtest_logreport(SimpleNamespace(**about))
    found = run.to_dict()
    assert found["tests"][asked] == {"cases": 3, "not_reached": 1, "passed": 1, "failed": 1}
    assert list(found["failures"].values()) == ["AssertionError: too far"]


def test_processes_share_the_cases_and_their_answers_are_added():
    asked, shares = upstream.TESTS["varlen"], []
    for number in range(3):
        cases = [SimpleNamespace(originalname=asked, nodeid=f"::{asked}[{i}]") for i in range(10)]
        run = upstream.Run([asked], 60, None, 0, (number, 3))
        run.pytest_collection_modifyitems(SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: None)), cases)
        shares.append({case.nodeid for case in cases})
        for case in cases[number:]:
            run.pytest_runtest_logreport(SimpleNamespace(when="call", outcome="passed", failed=False, nodeid=case.nodeid))
        shares[-1] = (shares[-1], {"which": ["varlen"], "pytest_status": number, **run.to_dict()})
    seen = [case for names, _ in shares for case in names]
    assert len(seen) == len(set(seen)) == 10
    found = upstream.merged([answer for _, answer in shares])
    assert found["tests"][asked] == {"cases": 10, "not_reached": 3, "passed": 7} and found["pytest_status"] == 2


def test_a_process_has_the_cases_of_its_kinds_so_that_it_compiles_few_kernels():
    asked, kinds = upstream.TESTS["varlen"], []
    for number in range(4):
        each = [{"dtype": t, "d": d, "causal": c, "seqlen_q": s} for s in range(5) for t in "ab" for d in (64, 128) for c in (0, 1)]
        cases = [
            SimpleNamespace(originalname=asked, nodeid=str(params), callspec=SimpleNamespace(params=params)) for params in each
        ]
        run = upstream.Run([asked], 60, None, 0, (number, 4))
        run.pytest_collection_modifyitems(SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: None)), cases)
        kinds.append({upstream.kind_of(case) for case in cases})
        assert len(cases) == 10
    assert [len(each) for each in kinds] == [2] * 4 and len(set().union(*kinds)) == 8


def test_an_edit_of_their_file_that_has_lost_its_place_is_an_error(tmp_path):
    there, here = tmp_path / "theirs", tmp_path / "copy"
    there.mkdir(), here.mkdir()
    for name in upstream.FILES:
        (there / name).write_text("".join(f"x = {old}\n" for old, _ in (*upstream.EDITS, *upstream.ON_CPU)))
    upstream.copied(there, here, "cpu")
    text = (here / upstream.FILES[0]).read_text()
    assert 'device = "cpu"' in text and "float16] + (" in text and "bfloat16" not in text
    upstream.copied(there, here, "cuda", processes=6)
    assert "(70 * 1024 ** 3 // 6," in (here / upstream.FILES[0]).read_text(), "side by side they fill what one would"
    (there / upstream.FILES[0]).write_text("")
    with pytest.raises(ValueError, match="their tests have changed"):
        upstream.copied(there, here, "cuda")
