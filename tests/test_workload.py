"""The workload's arithmetic: exact FLOPs, compulsory bytes, and refusals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasim.simulator.errors import UsageError
from fasim.simulator.problem.workload import Workload

LENGTH = st.integers(1, 40)


@given(LENGTH, LENGTH, st.booleans())
def test_flops_count_exactly_the_unmasked_pairs(seqlen_q, seqlen_k, causal):
    work = Workload(2, 6, head_dim=64, kv_heads=3, causal=causal, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    seen = np.ones((seqlen_q, seqlen_k), bool)
    if causal:
        seen = np.arange(seqlen_k)[None, :] <= np.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    assert work.pairs == seen.sum()
    assert work.flops == 4 * seen.sum() * 64 * 6 * 2


@given(LENGTH, LENGTH)
def test_rows_that_see_no_key_need_not_be_read(seqlen_q, seqlen_k):
    work = Workload(1, 1, head_dim=64, causal=True, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    rows = (np.arange(seqlen_q) + seqlen_k - seqlen_q >= 0).sum()
    assert work.compulsory_read_bytes == 2 * 64 * (rows + 2 * seqlen_k)


def test_tensor_bytes_follow_dtype_and_grouped_heads():
    work = Workload(2, 8, 128, 64, "e4m3", kv_heads=2)
    sizes = work.tensor_bytes
    assert (sizes["Q"], sizes["K"]) == (2 * 8 * 128 * 64, 2 * 2 * 128 * 64)
    assert sizes["O"] == 2 * sizes["Q"], "O of e4m3 inputs is bf16"
    assert sizes["LSE"] == 4 * 2 * 8 * 128


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"batch": 0}, "batch"),
        ({"heads": -1}, "heads"),
        ({"heads": 6, "kv_heads": 4}, "does not divide"),
        ({"dtype": "fp32"}, "fp16, bf16, e4m3"),
        ({"seqlen": 1.5}, "whole number"),
        ({"seqlen": True}, "whole number"),
        ({"seqlen": None}, "missing"),
    ],
)
def test_impossible_workloads_are_refused_in_one_sentence(fields, says):
    with pytest.raises(UsageError, match=says):
        Workload(**({"batch": 1, "heads": 4, "seqlen": 128} | fields))
