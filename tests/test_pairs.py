"""Kernels whose CTAs share an SM: they compile without spills, in their schedule's order, and the model knows what they may use."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from fasim.kernels.compile import build, disassemble  # noqa: E402
from fasim.kernels.cuda import config as alone  # noqa: E402
from fasim.kernels.cuda.pairs import config  # noqa: E402
from fasim.simulator.errors import UsageError  # noqa: E402
from fasim.simulator.predict import fits, predict  # noqa: E402
from fasim.simulator.problem.tile import Tile  # noqa: E402
from fasim.simulator.problem.workload import Workload  # noqa: E402
from fasim.traces import static  # noqa: E402

SHORT = Workload(32, 32, 512, 64, "bf16", causal=True)


@pytest.mark.skipif(build.compiler_version() is None, reason="NVRTC is not installed")
@pytest.mark.parametrize("variant", config.candidates("bf16", True), ids=lambda variant: variant.name.replace(" ", "-"))
def test_it_compiles_for_so_many_ctas_without_spills_in_the_order_of_its_schedule(variant):
    built = build.build(variant.source)
    report, tile = built.report, variant.tile
    assert (report.spill_bytes, report.stack_bytes, report.remarks) == (0, 0, ())
    assert report.registers * variant.threads * tile.resident <= 65536
    assert (report.dynamic_smem_bytes + 1024) * tile.resident <= 228 << 10
    (kernel,) = disassemble.of_cubin(built.cubin)
    assert static.differs(kernel, variant.schedule, Workload(1, 1, 8448, 64, "bf16", True), tile) == ""


def test_no_kernel_that_has_an_sm_alone_is_another_for_it():
    for schedule in ("pingpong", "overlap-2stage"):
        standing = alone.config_for(schedule, "bf16", 64, True)
        assert standing.source.headers == alone.headers() and "RESIDENT" not in standing.source.defines
    with pytest.raises(ValueError, match=r"softmax.cuh has 0 places for 'if \(!first\) \{', not one"):
        config._edited("softmax.cuh", "", (config.MAXIMUM_FIRST,))


def test_the_model_deals_an_sms_registers_to_the_ctas_that_share_it():
    wide, narrow = Tile(128, 64, 2, 2, resident=2), Tile(64, 64, 3, 1, resident=3)
    assert fits(SHORT, "warp-specialized-published", "h200", wide) == 2 and fits(SHORT, "overlap-2stage", "h200", narrow) == 3
    with pytest.raises(UsageError, match="= 116 per thread, a consumer of 'pingpong' has 104"):
        predict(SHORT, "pingpong", "h200", wide)
    with pytest.raises(UsageError, match="2 CTAs an SM are asked of Hopper schedules"):
        predict(SHORT, "fa2", "h200", Tile(128, 128, 1, 1, resident=2))
    with pytest.raises(UsageError, match="2 CTAs need .* bytes of shared memory, an SM has"):
        predict(SHORT, "overlap-2stage", "h200", Tile(64, 64, 7, 1, resident=2))
    shared, standing = predict(SHORT, "overlap-2stage", "h200", narrow), predict(SHORT, "fa3", "h200")
    assert shared.cycles < 0.8 * standing.cycles and shared.tile.to_dict()["resident"] == 3
