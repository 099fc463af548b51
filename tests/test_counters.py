"""Counters by Nsight Compute: whose they are, and what is said where there are none. No GPU is needed."""

from __future__ import annotations

import gzip
import subprocess

import pytest

from fasim.kernels.measure import counters
from fasim.kernels.validation.check import MissingTool
from fasim.simulator.errors import UsageError
from fasim.traces import nsight
from fasim.traces.nsight import Profiled


def rows(*names: str) -> list[Profiled]:
    return [Profiled(name, {}) for name in names]


def test_markers_part_the_calls():
    spin = "spin_kernel(long)"
    found = counters.part(rows("warm-up", spin, "a", "b", spin, spin, "c"), 3)
    assert [[kernel.name for kernel in group] for group in found] == [["a", "b"], [], ["c"]]
    assert counters.part(rows(spin, "a"), 2)[1] == []  # the program ended early: the rest has no counters
    with pytest.raises(UsageError, match="none of 2 calls"):
        counters.part([], 2)


def test_our_cuda_kernels_need_no_markers_but_for_a_call_that_failed():
    assert not counters.marked([{"kernel": "fa3"}, {"kernel": "pingpong"}])
    assert counters.marked([{"kernel": "fa3"}, {"kernel": "torch-cudnn"}])
    found = counters.part(rows("a", "spin_kernel(long)", "b"), 3, marked=False)
    assert [[kernel.name for kernel in group] for group in found] == [["a"], [], ["b"]]
    with pytest.raises(UsageError, match="4 calls where 3"):
        counters.part(rows("a", "b", "c", "d"), 3, marked=False)


@pytest.fixture
def fake_ncu(tmp_path, monkeypatch):
    """A program called ncu that writes what it is given to --log-file; returns a function to say what."""
    program = tmp_path / "ncu"
    program.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = --query-metrics ]; then cat {tmp_path}/known; exit 0; fi\n'
        f'while [ "$1" != --log-file ]; do shift; done\ncp {tmp_path}/said "$2"; exit $(cat {tmp_path}/status)\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(counters, "find", lambda: str(program))

    counters.known_metrics.cache_clear()

    def says(text: str, status: int = 0, known: str = ""):
        (tmp_path / "said").write_text(text)
        (tmp_path / "status").write_text(str(status))
        (tmp_path / "known").write_text(known)

    return says


TABLE = '"ID","Kernel Name","sm__cycles_elapsed.max"\n"","","cycle"\n"0","spin_kernel(long)","2,000"\n"1","attention","50,000"\n'


def test_the_profiled_program_is_one_that_python_finds(tmp_path):
    program = counters.child(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("[]", encoding="utf-8")
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 1 and "No module named" not in done.stderr


def test_a_call_is_counted_in_a_child_process(fake_ncu):
    fake_ncu("==PROF== Connected\n" + TABLE)
    ((kernel,),) = counters.profile([{"kernel": "fa2"}])
    assert kernel == Profiled("attention", {"sm__cycles_elapsed.max": 50_000.0})


def test_only_metrics_that_this_ncu_knows_are_asked_for(fake_ncu):
    fake_ncu("", known="sm__inst_executed_pipe_fma   Counter  inst  # of warp instructions\n")
    assert counters.known_metrics(counters.find()) == (*nsight.NEEDED, nsight.FMA)


def test_missing_permission_is_a_missing_tool_with_its_remedy(fake_ncu):
    fake_ncu("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters\n", 1)
    with pytest.raises(MissingTool, match="NVreg_RestrictProfilingToAdminUsers=0"):
        counters.profile([{"kernel": "fa2"}])


def test_any_other_complaint_of_ncu_is_passed_on(fake_ncu):
    fake_ncu("==ERROR== The application returned an error code (3).\n", 3)
    with pytest.raises(UsageError, match=r"status 3: The application returned an error code \(3\)"):
        counters.profile([{"kernel": "fa2"}])


def test_without_ncu_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(counters, "find", lambda: None)
    with pytest.raises(MissingTool, match="nsight-compute"):
        counters.profile([{"kernel": "fa2"}])


# -- machine code of kernels that are made at run time ---


def test_a_listing_is_what_ncu_prints_of_its_report(tmp_path, monkeypatch, capsys):
    from fasim.kernels.measure import listing

    program, plan = tmp_path / "ncu", tmp_path / "plan.toml"
    program.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = --import ]; then cat "$2"; exit 0; fi\necho "$@" > {tmp_path}/asked\n'
        'while [ "$1" != --export ]; do shift; done\necho "1,HGMMA.64x64x16" > "$2.ncu-rep"\n'
    )
    program.chmod(0o755)
    plan.write_text('[[runs]]\nkernels = ["peer:cudnn"]\nbatch = 1\nheads = 1\nseqlen = 128\ndirection = "backward"\n')
    monkeypatch.setattr(counters, "find", lambda: str(program))
    monkeypatch.setattr("sys.argv", ["listing", "--plan", str(plan), "--of", "bprop|bwd", "--out", str(tmp_path / "out")])
    assert listing.main() == 0 and "1 lines" in capsys.readouterr().out
    with gzip.open(tmp_path / "out" / "listing.csv.gz", "rt") as file:
        assert file.read() == "1,HGMMA.64x64x16\n"
    assert "--kernel-name regex:bprop|bwd" in (tmp_path / "asked").read_text()
    monkeypatch.setattr(counters, "find", lambda: None)
    assert listing.main() == 3
