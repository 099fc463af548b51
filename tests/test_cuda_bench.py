"""The bench's arithmetic: the papers' shapes, the figures it is held against, and the ratio to FlashAttention-3."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")

from fasim.kernels.measure import beside_cuda as bench
from fasim.simulator.problem.workload import Workload


def test_every_default_shape_has_fa3_and_cudnn_figures_of_the_same_gpu():
    works = bench.workloads((64, 128, 256), None, "fp16")
    published = bench.published_tflops()
    for w in works:
        assert w.batch * w.seqlen_q == 16384 and w.heads * w.head_dim == 2048
        assert published[w.batch, w.heads, w.seqlen_q, w.head_dim, w.causal].keys() == {"fa3", "cudnn"}
    assert len(works) == len(set(works)) == 24
    assert published[1, 16, 16384, 128, False] == {"fa3": 720.1, "cudnn": 669.0}


def test_the_ratio_to_fa3_takes_the_gpu_of_the_day_out():
    then = {"fa3": 720.0, "cudnn": 660.0}
    assert bench.versus_fa3(720.0, 660.0, then) == pytest.approx(1.0)
    assert bench.versus_fa3(0.9 * 720.0, 0.9 * 660.0, then) == pytest.approx(1.0)
    assert bench.versus_fa3(1.1 * 720.0, 660.0, then) == pytest.approx(1.1)


def rows(workload, **tflops):
    return [{"kernel": name.replace("_", "-"), **workload.to_dict(), "tflops": rate} for name, rate in tflops.items()]


def test_rows_are_compared_and_averaged_by_geometric_mean_and_what_is_missing_stays_out():
    found = []
    for seqlen, ours in ((4096, 702.1), (16384, 720.1 * 1.21)):
        w = Workload(16384 // seqlen, 16, seqlen, 128, "fp16", False)
        cudnn = bench.published_tflops()[w.batch, 16, seqlen, 128, False]["cudnn"]
        found += bench.compare(rows(w, fasim_fa3=ours, cudnn=cudnn), w)
    odd = Workload(4, 16, 8448, 128, "fp16", False)
    found += bench.compare(rows(odd, fasim_fa3=600.0, cudnn=500.0), odd)
    assert [row.get("vs_fa3") for row in found] == [1.0, None, 1.21, None, None, None]
    assert found[4]["vs_cudnn"] == 1.2
    (mean,) = bench.means_of(found)
    assert mean["vs_fa3"] == {"geometric_mean": 1.1, "least": 1.0, "rows": 2} and mean["vs_cudnn"]["rows"] == 3


def test_without_cudnn_in_the_run_no_ratio_is_claimed_and_a_refusal_is_shown():
    w = Workload(4, 16, 4096, 128, "fp16", True)
    found = bench.compare(rows(w, fasim_fa3=700.0), w)
    found.append({"kernel": "cudnn", **w.to_dict(), "refused": "RuntimeError: no"})
    assert "vs_fa3" not in found[0] and bench.means_of(found) == []
    text = bench.table_of({"rows": found, "means": []})
    assert "cudnn refused" in text and "cudnn d128: RuntimeError: no" in text
    json.dumps(found)
