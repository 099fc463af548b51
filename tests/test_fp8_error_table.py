"""FlashAttention-3's table of numerical errors, emulated: its order, the paper's figures beside it, and `fasim accuracy`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from fasim.kernels.fp8 import error_table  # noqa: E402
from fasim.simulator.errors import UsageError  # noqa: E402


@pytest.fixture(scope="module")
def rows():
    return {row["method"]: row for row in error_table.table(seqlen=1024, queries=64, heads=4)}


def test_fp16_is_a_hundred_times_finer_and_hadamard_halves_the_error_of_fp8(rows):
    found = [row["rmse"] for row in rows.values()]
    standard, flash, tensor, _, hadamard, both, two_level = found
    assert flash < standard < 1e-3 and 50 < tensor / flash < 200
    assert hadamard < 0.75 * tensor and both < 0.75 * tensor and two_level < 1.02 * both


def test_every_row_of_the_paper_stands_beside_its_own(rows):
    assert [row["paper"] for row in rows.values()] == [3.2e-4, 1.9e-4, 2.4e-2, 2.4e-2, 9.3e-3, 9.1e-3, None]


def test_the_inputs_are_the_papers():
    x = error_table.outliers((1 << 21,), torch.Generator().manual_seed(0))
    assert float(x.var()) == pytest.approx(1.0 + 0.001 * 100, rel=0.01)
    assert float((x.abs() > 6).double().mean()) == pytest.approx(0.001 * 0.5486 + 2e-9, rel=0.1)


@pytest.mark.parametrize("given", [{"seqlen": 0}, {"queries": -1}, {"heads": 1 << 20}, {"head_dim": 80}])
def test_a_size_that_is_none_is_refused(given):
    with pytest.raises(UsageError, match=next(iter(given))):
        error_table.table(**given)


def test_the_command_gives_the_same_as_data(fasim):
    tokens = ("accuracy", "--seqlen", "128", "--queries", "16", "--heads", "1")
    status, out, _ = fasim(*tokens, "--json")
    found = json.loads(out)
    assert status == 0 and found["rows"] == error_table.table(seqlen=128, queries=16, heads=1)
    status, out, _ = fasim(*tokens)
    assert status == 0 and "9.1e-03" in out and "emulated on the CPU" in out


RECORDED = json.loads((Path(error_table.PAPER).parents[1] / "recorded" / "kernels" / "fp8_errors_h200.json").read_text())


def test_on_an_h200_every_row_is_within_a_tenth_of_the_papers():
    (found,) = (each["rows"] for each in RECORDED["tables"] if (each["head_dim"], each["seqlen"]) == (128, 8192))
    assert [row["method"] for row in found] == [row.name for row in error_table.rows(128)]
    published = [row for row in found if row["paper"]]
    assert len(published) == 6 and all(abs(row["rmse"] / row["paper"] - 1) < 0.1 for row in published)


def test_on_an_h200_two_levels_keep_the_error_of_long_rows():
    """V around 1: 128k keys beside 1k, without and with P V of a few blocks apart."""
    error = {
        each["seqlen"]: {n: x["rmse"] for n, x in each["two_level"].items()}
        for each in RECORDED["lengths"]
        if each["v"] != "normal"
    }
    assert error[131072]["None"] > 30 * error[1024]["None"]
    assert all(error[131072][n] < 1.5 * error[1024][n] for n in ("1", "4"))
