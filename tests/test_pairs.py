"""Kernels whose CTAs share an SM: they compile without spills, in their schedule's order, and the model knows what they may use."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from fasim.kernels import ops  # noqa: E402
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
@pytest.mark.parametrize("variant", config.variants(), ids=lambda variant: variant.name.replace(" ", "-"))
def test_it_compiles_for_so_many_ctas_without_spills_in_the_order_of_its_schedule(variant):
    built = build.build(variant.source)
    report, tile = built.report, variant.tile
    assert (report.spill_bytes, report.stack_bytes, report.remarks) == (0, 0, ())
    assert report.registers * variant.threads * tile.resident <= 65536
    assert (report.dynamic_smem_bytes + 1024) * tile.resident <= 228 << 10
    (kernel,) = disassemble.of_cubin(built.cubin)
    assert static.differs(kernel, variant.schedule, Workload(1, 1, 8448, 64, variant.dtype, variant.causal), tile) == ""


def test_no_kernel_that_has_an_sm_alone_is_another_for_it():
    for schedule in ("pingpong", "overlap-2stage"):
        standing = alone.config_for(schedule, "bf16", 64, True)
        assert standing.source.headers == alone.headers() and "RESIDENT" not in standing.source.defines
    with pytest.raises(ValueError, match="attention.cuh has 0 places for '__launch_bounds__.*', not one"):
        config._edited("attention.cuh", "", (config.BOUNDS,))


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


def test_auto_takes_it_for_short_rows_where_it_can_be_had(monkeypatch):
    q = SimpleNamespace(shape=(1, 512, 1, 64), is_cuda=True, dtype=torch.bfloat16, get_device=lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(ops.build, "compiler_version", lambda: "13.0")
    ops._fastest.cache_clear()
    (name,) = config.NAMES
    assert ops._resolve("auto", q, True, 2048) == ops._resolve("auto", q, False, 1024) == name
    assert ops._resolve("auto", q, True, 8192) == "fa3" and ops._resolve("fa3", q, True, 512) == "fa3"
    wide = SimpleNamespace(**vars(q) | {"shape": (1, 512, 1, 128)})
    assert ops._resolve("auto", wide, True, 512) == "fa3"
    monkeypatch.setattr(ops.build, "compiler_version", lambda: None)
    here = config.config_for(name, "bf16", 64, True).source
    monkeypatch.setattr(ops.build, "lookup", lambda source: None if source == here else "found")
    ops._fastest.cache_clear()
    assert ops._resolve("auto", q, True, 512) == "fa3" and ops._resolve("auto", q, False, 512) == name
    ops._fastest.cache_clear()


def test_other_head_dims_and_devices_are_refused_in_one_sentence():
    (name,) = config.NAMES
    with pytest.raises(UsageError, match=rf"head_dim=128 is not supported by '{name}' \(64\)"):
        config.config_for(name, "bf16", 128, False)
    q = torch.zeros(1, 4, 1, 64).half()
    with pytest.raises(UsageError, match=f"the '{name}' kernel runs on an H100 or H200"):
        ops.flash_attn_func(q, q, q, schedule=name)
