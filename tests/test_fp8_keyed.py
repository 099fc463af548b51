"""V as rows of keys: the layout and the kernels that need no transposition, without a GPU."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from fasim.kernels.compile import build  # noqa: E402
from fasim.kernels.cuda.fp8 import keyed as kernels  # noqa: E402
from fasim.kernels.fp8 import keyed  # noqa: E402
from fasim.simulator.problem.workload import Workload  # noqa: E402
from fasim.traces import static  # noqa: E402


def test_a_row_has_a_column_of_all_keys_in_the_order_of_the_accumulators():
    """A thread of a quad holds keys 2 i, 2 i + 1, 2 i + 8, 2 i + 9 of sixteen (PTX ISA, wgmma: layout of D), four bytes of P."""
    v = torch.arange(2 * 20 * 3 * 4, dtype=torch.int64).remainder(251).to(torch.uint8).view(2, 20, 3, 4)
    rows = keyed.as_rows_of_keys(v)
    assert rows.shape == (2, 3, 4, 32) and rows.is_contiguous()
    for position in range(32):
        group, i, within = position // 16, position % 16 // 4, position % 4
        key = 16 * group + 2 * i + (0, 1, 8, 9)[within]
        want = v[:, key].permute(0, 1, 2) if key < 20 else torch.zeros(2, 3, 4, dtype=torch.uint8)
        assert torch.equal(rows[..., position], want)


@pytest.mark.parametrize("seqlen", [1, 16, 70])
def test_the_layout_is_undone(seqlen):
    v = torch.arange(2 * seqlen * 3 * 4).remainder(251).to(torch.uint8).view(2, seqlen, 3, 4)
    assert torch.equal(keyed.from_rows_of_keys(keyed.as_rows_of_keys(v), seqlen), v)


def test_the_layout_alone_gave_the_same_bits_and_was_faster():
    """Recorded before kernels of d128 lost their turns and took a second block's maximum, which only their producer's file has."""
    root = Path(kernels.__file__).parents[3]
    recorded = json.loads((root / "traces" / "recorded" / "kernels" / "fp8_keyed_h200.json").read_text())
    for path, digest in recorded["kernel_sha256"].items():
        if not path.endswith("keyed/producer.cuh"):
            assert hashlib.sha256((root / path).read_bytes()).hexdigest() == digest, path
    assert len(recorded["checks"]) == 18 and not any(row[name] for row in recorded["checks"] for name in ("O", "LSE", "V"))
    assert len(recorded["rows"]) == 16 and all(row["keyed"] < row["transposing"] for row in recorded["rows"])


@pytest.mark.skipif(build.compiler_version() is None, reason="NVRTC is not installed")
def test_they_compile_without_spills_in_the_schedules_order_and_no_warp_transposes(code_of):
    variants = [kernel for kernel in kernels.keyed_variants() if kernel.causal]
    assert {kernel.head_dim for kernel in variants} == {64, 128, 256}
    for kernel, built in zip(variants, build.build_all([kernel.source for kernel in variants]), strict=True):
        assert isinstance(built, build.Built), built
        assert (built.report.spill_bytes, built.report.stack_bytes, built.report.remarks) == (0, 0, ())
        assert built.report.smem_bytes <= 227 * 1024
        code = code_of(built.cubin)
        opcodes = {each.name for each in code.instructions}
        assert {"QGMMA", "UTMALDG"} <= opcodes and not {"LDSM", "PRMT"} <= opcodes and "LDL" not in opcodes
        workload = Workload(1, 1, 8448, kernel.head_dim, "e4m3", kernel.causal)
        assert static.differs(code, kernel.schedule, workload, kernel.fit.tile) == ""
