"""A compiled kernel predicted from its machine code: the order that is read, the code, and the sentence where it cannot be."""

from __future__ import annotations

import json
from functools import cache

import pytest

from fasim.kernels.compile import build, disassemble
from fasim.kernels.compile.kernel_file import pipeline_of
from fasim.kernels.cuda.config import config_for
from fasim.simulator import schedules
from fasim.simulator.code import loop_reader, sass
from fasim.simulator.code.pipeline import Pipeline
from fasim.simulator.predict import predict, programs
from fasim.simulator.problem.workload import Workload

pytestmark = pytest.mark.skipif(build.compiler_version() is None, reason="NVRTC is not installed")
KERNELS = ("warp-specialized", "pingpong", "overlap-2stage", "overlap-3stage", "fa3")
LAGS = {"warp-specialized": 0, "pingpong": 0, "overlap-2stage": 1, "overlap-3stage": 2, "fa3": 1}
"""Blocks that P V is behind the S that a turn of the loop issues."""


@cache
def read(schedule: str, causal: bool = False) -> Pipeline:
    if disassemble_missing():
        pytest.skip("no disassembler: it comes with CUDA and with Triton's wheel")
    return loop_reader.read(disassemble.of_cubin(build.build(config_for(schedule, "fp16", 128, causal).source).cubin)[0])


def disassemble_missing() -> bool:
    try:
        return not disassemble.tool("nvdisasm")
    except disassemble.MissingDisassembler:
        return True


@pytest.mark.parametrize("schedule", KERNELS)
def test_its_tile_and_how_far_its_loop_runs_ahead_are_read(schedule):
    found = read(schedule)
    tile = config_for(schedule, "fp16", 128, False).tile
    assert schedules.adopt(f"{schedule} read", found).tile == tile
    assert (found.head_dim, found.element_bytes, found.persistent, found.looks_for_maximum) == (128, 2, True, False)
    lags = {(step.what, step.tensor): step.lag for step in found.blocks[0].steps}
    assert lags["scores", "K"] == 0 and lags["values", "V"] == lags["free", "V"] == LAGS[schedule]
    assert found.takes_turns == (schedule in ("pingpong", "fa3"))


@pytest.mark.parametrize(("schedule", "causal"), [*((each, False) for each in KERNELS), ("fa3", True)])
def test_its_own_order_and_code_give_the_cycles_of_its_schedule(schedule, causal):
    workload = Workload(1, 10, 2048, 128, "fp16", causal)
    name = schedules.adopt(f"{schedule} {causal} compiled", read(schedule, causal)).name
    compiled, estimated = (predict(workload, each, "h200", clock_hz=1.5e9).cycles for each in (name, schedule))
    assert compiled == pytest.approx(estimated, rel=0.06)


def test_another_schedules_order_takes_its_code():
    own = schedules.adopt("fa3 in turn", read("fa3"), "pingpong")
    workload = Workload(1, 16, 2048, 128, "fp16")
    (program,) = programs(workload, own.name, "h200", kv_blocks=6)
    assert "take turn" in program.labels
    found = predict(workload, own.name, "h200", clock_hz=1.5e9)
    assert found.cycles == pytest.approx(predict(workload, "pingpong", "h200", clock_hz=1.5e9).cycles, rel=0.08)


def test_what_cannot_be_read_is_said(fasim, tmp_path):
    other = tmp_path / "kernel.cubin"
    other.write_text("no machine code")
    status, out, err = fasim("predict", "--kernel", str(other))
    assert (status, out) == (2, "") and "holds no machine code" in err and err.count("\n") == 1
    with pytest.raises(schedules.UsageError, match="no loop with S = Q K"):
        loop_reader.read(sass.Code("empty", (), {}))


def test_a_file_gives_what_its_kernel_gives_by_name(fasim, tmp_path):
    if disassemble_missing():
        pytest.skip("no disassembler: it comes with CUDA and with Triton's wheel")
    path = tmp_path / "mine.cubin"
    path.write_bytes(build.build(config_for("fa3", "fp16", 128, False).source).cubin)
    shape = ("--batch", "1", "--heads", "4", "--seqlen", "1024", "--json")
    cycles = []
    for asked in ("fa3", str(path), f"{path}:attention"):
        status, out, err = fasim("predict", "--kernel", asked, *shape)
        assert status == 0 and "the order of their loop and its" in err
        cycles.append(json.loads(out)[0]["cycles"])
    assert len(set(cycles)) == 1
    status, _, err = fasim("predict", "--kernel", f"{path}:nothing", *shape)
    assert status == 2 and "has no kernel with 'nothing' in its name" in err


REFUSED = (
    (("fa3", "--schedule", "fa2"), "'fa2' has no WGMMA"),
    (("fa3", "--head-dim", "96"), "head_dim=96 is not supported by our CUDA kernels (64, 128, 256)"),
    (("fa3", "--pass", "both"), "--kernel reads forward kernels alone"),
    (("fa3", "--tile", "128x64"), "fa3 is compiled for 128x128"),
    (("pingpong", "--dtype", "e4m3"), "schedule='pingpong' has no FP8 kernel"),
    (("fa3-fwd-0.0.3", "--dtype", "fp16", "--head-dim", "32"), "fa3-fwd-0.0.3 has no kernel for"),
)


@pytest.mark.parametrize(("asked", "said"), REFUSED)
def test_a_variant_that_there_is_not_is_refused_in_a_sentence(fasim, asked, said):
    if disassemble_missing():
        pytest.skip("no disassembler: it comes with CUDA and with Triton's wheel")
    status, out, err = fasim("predict", "--kernel", *asked)
    assert (status, out) == (2, "") and said in err


def test_an_fp8_kernel_of_ours_is_read_too():
    if disassemble_missing():
        pytest.skip("no disassembler: it comes with CUDA and with Triton's wheel")
    found = pipeline_of("fa3", Workload(1, 1, 8448, 128, "e4m3"))
    assert (found.block_n, found.head_dim, found.element_bytes, found.takes_turns, found.lag) == (192, 128, 1, True, 1)
    assert found.blocks[0].pipes["mufu"] == 192 // 2
