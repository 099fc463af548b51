"""The recorded times of the Triton kernels are of the sources that stand here, and keep what the project promises of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

import fasim

ROOT = Path(fasim.__file__).parent
RECORD = json.loads((ROOT / "traces" / "recorded" / "kernels" / "triton_h200.json").read_text(encoding="utf-8"))


def rate(kernel: str, sweep: str, seqlen: int, causal: bool) -> float:
    """TFLOP/s at head_dim 128."""
    (row,) = (
        row
        for row in RECORD["rows"]
        if (row["kernel"], row["pass"], row["seqlen_q"], row["causal"], row["head_dim"]) == (kernel, sweep, seqlen, causal, 128)
    )
    return row["tflops"]


def test_the_record_is_of_todays_triton_kernels():
    recorded = {name: digest for name, digest in RECORD["kernel_sha256"].items() if "/triton/" in name}
    today = {f"kernels/triton/{path.name}": path for path in (ROOT / "kernels" / "triton").glob("*.py")}
    assert recorded == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in today.items()}
    assert "H200" in RECORD["device"] and RECORD["driver"] and RECORD["packages"]["triton"]


def test_every_timed_kernel_was_right():
    assert all(row["relative_error"] < (4e-3 if row["dtype"] == "bf16" else 1e-3) for row in RECORD["rows"] if "tflops" in row)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("seqlen", [4096, 16384])
def test_the_speed_that_is_promised_at_head_dim_128(seqlen, causal):
    ours = rate("fasim-fa2", "forward", seqlen, causal)
    assert ours >= 1.05 * rate("flex", "forward", seqlen, causal)
    assert ours >= 1.5 * rate("fa2-pytorch", "forward", seqlen, causal)
    assert rate("fasim-fa2", "backward", seqlen, causal) >= 1.2 * rate("fa2-pytorch", "backward", seqlen, causal)
