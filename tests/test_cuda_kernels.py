"""Every CUDA kernel, compiled without a GPU: registers, shared memory, instructions, and the simulator's tiles."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest
from estimates import ARITHMETIC, estimated_block

from fasim.kernels.compile import build
from fasim.kernels.compile.inspect import inspect
from fasim.kernels.cuda import catalog
from fasim.kernels.cuda.config import HEAD_DIMS, SCHEDULES, config_for, variants
from fasim.simulator.devices.device import load_device
from fasim.simulator.predict import default_tile
from fasim.simulator.problem.workload import Workload
from fasim.traces import static

pytestmark = pytest.mark.skipif(build.compiler_version() is None, reason="NVRTC is not installed")

REGISTER_FILE = 65536
WARPGROUP = 128
MAX_SMEM_BYTES = 227 * 1024
TAKES_TURNS = {("overlap-3stage", 256)} | {(schedule, head_dim) for schedule in ("pingpong", "fa3") for head_dim in HEAD_DIMS}
TURN = f"{2 * WARPGROUP:#x}"
"""Threads of a turn's named barrier: the warpgroup that gives it and the one that takes it."""
CONFIGS = [config for config in variants() if config.schedule not in catalog.missing()]
TRACED = [
    config_for(schedule, "fp16", head_dim, True, trace=True)
    for schedule in SCHEDULES
    for head_dim in HEAD_DIMS
    if schedule not in catalog.missing()
]
each = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name.replace(" ", "-"))


@pytest.fixture(scope="module")
def compiled():
    """Config -> its Built, or its CompileError; on all cores, and from the cache where it can be."""
    configs = [*CONFIGS, *TRACED]
    return dict(zip(configs, build.build_all([config.source for config in configs]), strict=True))


@pytest.fixture
def kernel(compiled, config, code_of):
    assert isinstance(compiled[config], build.Built), compiled[config]
    return code_of(compiled[config].cubin)


@pytest.fixture
def code(kernel):
    """(opcode, operands) of each instruction."""
    return [(each.opcode, each.operands) for each in kernel.instructions]


def test_every_schedule_of_the_ladder_has_a_kernel():
    assert catalog.missing() == ()


@each
def test_it_compiles_without_spills_within_its_registers_and_shared_memory(compiled, config):
    found = compiled[config]
    assert isinstance(found, build.Built), found
    report = found.report
    assert (report.spill_bytes, report.stack_bytes) == (0, 0)
    assert 0 < report.registers <= REGISTER_FILE // config.threads // 8 * 8
    assert 0 < report.smem_bytes <= MAX_SMEM_BYTES
    assert report.remarks == ()  # such as "wgmma instructions are serialized"


@each
def test_it_loads_by_tma_multiplies_by_wgmma_and_moves_registers_to_its_consumers(code, config):
    opcodes = Counter(opcode.split(".")[0] for opcode, _ in code)
    assert opcodes["HGMMA"] and opcodes["UTMALDG"]
    assert not {"HMMA", "LDL", "STL"} & opcodes.keys()
    splits = {opcode.split(".")[1]: operands for opcode, operands in code if opcode.startswith("USETMAXREG")}
    producer, consumer = (int(splits[way].split(",")[-1], 16) for way in ("DEALLOC", "TRY_ALLOC"))
    assert WARPGROUP * (producer + config.tile.consumers * consumer) <= REGISTER_FILE
    assert consumer == {2: 240, 3: 160}[config.tile.consumers]
    highest = max(int(register) for _, operands in code for register in re.findall(r"\bR(\d+)\b", operands))
    assert highest < consumer


@each
def test_its_instructions_have_the_tile_of_the_simulator(code, config):
    workload = Workload(1, 1, 8448, config.head_dim, config.dtype, config.causal)
    assert config.tile == default_tile(workload, config.schedule, load_device("h200"))
    shapes = {re.match(r"HGMMA\.64x(\d+)x16", opcode)[1] for opcode, _ in code if opcode.startswith("HGMMA")}
    assert shapes == {str(config.tile.block_n), str(config.head_dim)}
    types = {"BF16" in opcode for opcode, _ in code if opcode.startswith("HGMMA")}
    assert types == {config.dtype == "bf16"}
    multicast = any("MULTICAST" in opcode for opcode, _ in code)
    assert multicast == (config.tile.cluster > 1)


@each
def test_it_takes_turns_by_named_barriers_if_its_schedule_does(code, config):
    waits = [operands for opcode, operands in code if opcode.startswith("BAR.SYNC") and operands.endswith(TURN)]
    gives = [operands for opcode, operands in code if opcode.startswith("BAR.ARV") and operands.endswith(TURN)]
    assert bool(waits) == ((config.schedule, config.head_dim) in TAKES_TURNS)
    assert gives or not waits


@pytest.mark.parametrize("config", TRACED, ids=lambda config: config.name.replace(" ", "-"))
def test_a_stamp_of_its_trace_build_is_a_clock_and_a_store_and_disturbs_nothing_else(compiled, code_of, config):
    built, plain = compiled[config], compiled[replace(config, trace=False)]
    assert isinstance(built, build.Built), built
    assert (built.report.spill_bytes, built.report.stack_bytes, built.report.remarks) == (0, 0, ())
    clocks, stores, gemms = [], [], []
    for cubin in (plain.cubin, built.cubin):
        code = code_of(cubin).instructions
        clocks.append(sum("CLOCK" in each.operands for each in code))
        stores.append(sum(each.name == "STG" for each in code))
        gemms.append([each.opcode for each in code if each.name == "HGMMA"])
    assert clocks[0] == 0 < clocks[1] == stores[1] - stores[0]
    assert gemms[0] == gemms[1]


@each
def test_the_machine_code_stands_in_the_order_and_has_the_instructions_that_the_model_says(kernel, config):
    """Instructions a block within a tenth: by pipe, and what is no arithmetic: addresses, barriers, branches, the GEMMs' own."""
    workload = Workload(1, 1, 8448, config.head_dim, config.dtype, config.causal)
    assert static.differs(kernel, config.schedule, workload, config.tile) == ""
    found = inspect(kernel)
    assert found.local == 0 and not found.remarks
    elements = config.tile.block_m // config.tile.consumers * config.tile.block_n // WARPGROUP
    main = next(turn for turn in found.turns if turn.scores)
    assert main.scores % elements == 0 and main.pipes["mufu"] >= main.scores
    estimated, blocks = estimated_block(config.schedule, workload), main.scores // elements
    counted = main.pipes | {"rest": main.instructions - sum(main.pipes[pipe] for pipe in ARITHMETIC)}
    for pipe, instructions in estimated.items():
        assert instructions == pytest.approx(counted[pipe] / blocks, rel=0.1), pipe
    assert {turn for turn in found.means if "WGMMA" in turn or "TMA" in turn} == {"loads by TMA", "GEMMs by WGMMA"}


SCORES, VALUES = "  wg.wait_scores<1>(S, j);\n", "  wg.wait_values<0>(j - 1);\n"
FREE_K, FREE_V = "  wg.free_k(j);\n", "  wg.free_v(j - 1);\n"
PLANTED = {
    "two waits exchanged": ((SCORES, "WAIT"), (VALUES, SCORES), ("WAIT", VALUES)),
    "K and V handed back in each other's place": ((FREE_K, "FREE"), (FREE_V, FREE_K), ("FREE", FREE_V)),
    "V handed back before P V is over": ((FREE_V, ""), (VALUES, FREE_V + VALUES)),
}
"""Faults in the step of a copy of fa3, some with right numbers: old texts and new ones."""


@pytest.mark.parametrize("fault", PLANTED)
def test_an_order_that_the_schedule_does_not_say_is_found(fault, code_of):
    config = config_for("fa3", "fp16", 128, causal=False)
    before, step, after = re.split(r"(void step\(.*?\n\}\n)", config.source.text, maxsplit=1, flags=re.DOTALL)
    for old, new in PLANTED[fault]:
        assert old in step
        step = step.replace(old, new)
    kernel = code_of(build.build(replace(config.source, text=before + step + after)).cubin)
    assert "where fa3 says" in static.differs(kernel, "fa3", Workload(1, 1, 8448, 128), config.tile)
