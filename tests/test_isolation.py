"""A subject that ends its process fails the check it did so in, and nothing else."""

import pytest

torch = pytest.importorskip("torch")

from fasim.kernels.validation.check import FAIL, PASS, SKIP  # noqa: E402
from fasim.kernels.validation.isolation import validate_apart  # noqa: E402
from fasim.simulator.errors import UsageError  # noqa: E402

MODULE = """
import os, pathlib, signal, torch

def right(q, k, v, *, causal=False, softmax_scale=None):
    s = torch.einsum("bmhd,bnhd->bhmn", q.float(), k.float().repeat_interleave(q.shape[2] // k.shape[2], 2))
    s = s * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if causal:
        s = s.masked_fill(~torch.ones(s.shape[-2:], dtype=torch.bool).tril(k.shape[1] - q.shape[1]), float("-inf"))
    p = torch.softmax(s, -1).nan_to_num(0.0)
    return torch.einsum("bhmn,bnhd->bmhd", p, v.float().repeat_interleave(q.shape[2] // v.shape[2], 2)).to(q.dtype)

calls = 0

def dies_once(q, k, v, **options):
    global calls
    calls += 1
    mark = pathlib.Path("died")
    if calls == 4 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGFPE)
    print("from the kernel")
    return right(q, k, v, **options)

def dies_at_once(q, k, v, *, causal=False, softmax_scale=None):
    os._exit(7)
"""
OPTIONS = {"device": "cpu", "dtype": "fp16", "seed": 0, "quick": True, "forward_only": True}


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "dying.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)


def test_the_rest_is_asked_after_a_process_was_lost(module, capfd):
    seen = []
    report = validate_apart("dying:dies_once", only=["determinism"], advance=lambda *at: seen.append(at), **OPTIONS)
    (failure,) = report.failures
    assert "was ended by SIGFPE" in failure.message and failure.group == "determinism"
    others = [check.verdict for check in report.checks if check is not failure]
    assert others.count(PASS) and set(others) <= {PASS, SKIP, "note"}
    assert len({(check.group, check.case) for check in report.checks}) == len(report.checks), "each was asked once"
    assert "dying:dies_once, determinism: " + failure.case in [what for _, _, what in seen]
    assert "from the kernel" not in capfd.readouterr().out


def test_a_subject_that_dies_in_its_first_call_is_one_finding(module):
    report = validate_apart("dying:dies_at_once", **OPTIONS)
    assert [(check.verdict, check.group) for check in report.checks] == [(FAIL, "survey")]
    assert "exited with status 7" in report.checks[0].message


def test_what_is_asked_wrongly_is_said_as_without_a_process_of_its_own(module):
    with pytest.raises(UsageError, match="has no callable 'nobody'"):
        validate_apart("dying:nobody", **OPTIONS)
