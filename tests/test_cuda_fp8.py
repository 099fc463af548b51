"""The FP8 kernels without a GPU: compiled, their registers and instructions, and what the launcher refuses."""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections import Counter

import pytest

from fasim.kernels.compile import build
from fasim.kernels.cuda.fp8 import config
from fasim.kernels.cuda.fp8.wgmma import header
from fasim.simulator.code import sass as machine_code
from fasim.simulator.errors import UsageError
from fasim.simulator.language.program import trace
from fasim.simulator.problem.workload import Workload
from fasim.simulator.schedules import SCHEDULES
from fasim.traces import static

COMPILED = [kernel for kernel in config.variants() if kernel.causal and kernel.output == "bf16"]
COMPILED = [kernel for kernel in COMPILED if kernel.block_scales or not kernel.two_levels]
COMPILED = [kernel for kernel in COMPILED if kernel.schedule == "fa3" or not (kernel.block_scales or kernel.two_levels)]
APPROXIMATE = [
    kernel for kernel in COMPILED if kernel.approximate and kernel.block_scales > kernel.two_levels and kernel.fit.keys > 4096
]
COMPILED = [kernel for kernel in COMPILED if not kernel.approximate] + APPROXIMATE


def _named(kernel):
    return f"n{kernel.fit.tile.block_n} {kernel.name}"


each = pytest.mark.parametrize("kernel", COMPILED, ids=_named)
each_exact = pytest.mark.parametrize("kernel", [kernel for kernel in COMPILED if not kernel.approximate], ids=_named)
needs_nvrtc = pytest.mark.skipif(build.compiler_version() is None, reason="NVRTC is not installed")
REGISTER_FILE, MAX_SMEM_BYTES = 65536, 227 * 1024


@pytest.fixture(scope="module")
def compiled():
    return dict(zip(COMPILED, build.build_all([kernel.source for kernel in COMPILED]), strict=True))


@pytest.fixture
def code(compiled, kernel, code_of):
    return code_of(compiled[kernel].cubin)


@pytest.fixture
def listing(code):
    """(opcode, operands) of each instruction."""
    return [(each.opcode, each.operands) for each in code.instructions]


@needs_nvrtc
@each
def test_it_compiles_without_spills_within_its_registers_and_shared_memory(compiled, kernel):
    found = compiled[kernel]
    assert isinstance(found, build.Built), found
    report = found.report
    assert (report.spill_bytes, report.stack_bytes) == (0, 0)
    assert 0 < report.registers <= REGISTER_FILE // kernel.threads // 8 * 8
    assert 0 < report.smem_bytes <= MAX_SMEM_BYTES
    assert report.remarks == ()  # such as "wgmma instructions are serialized"


@needs_nvrtc
@each
def test_it_multiplies_bytes_and_transposes_v_by_matrix_loads_and_stores(listing, kernel):
    opcodes = Counter(opcode.split(".")[0] for opcode, _ in listing)
    assert opcodes["QGMMA"] and opcodes["UTMALDG"] and not {"HGMMA", "HMMA", "LDL", "STL"} & opcodes.keys()
    shapes = {match[1] for opcode, _ in listing if (match := re.match(r"QGMMA\.64x(\d+)x32\.F32\.E4M3\.E4M3", opcode))}
    assert shapes == {str(kernel.fit.tile.block_n), str(kernel.head_dim)}
    assert any(opcode.startswith("LDSM") and "T" in opcode for opcode, _ in listing)
    splits = {opcode.split(".")[1]: operands for opcode, operands in listing if opcode.startswith("USETMAXREG")}
    producer, consumer = (int(splits[way].split(",")[-1], 16) for way in ("DEALLOC", "TRY_ALLOC"))
    assert consumer == kernel.fit.consumer_registers
    assert 128 * (producer + kernel.fit.tile.consumers * consumer) <= REGISTER_FILE
    highest = max(int(register) for _, operands in listing for register in re.findall(r"\bR(\d+)\b", operands))
    assert highest < consumer


@needs_nvrtc
@each
def test_p_is_packed_by_two_conversions_for_four_weights_and_no_shuffle(listing, kernel):
    """A block's weights take half a conversion each; shuffles are the row maxima's and sums', not P's."""
    conversions = sum(opcode.startswith("F2FP") and "E4M3" in opcode for opcode, _ in listing)
    exponentials = sum(opcode == "MUFU.EX2" for opcode, _ in listing)
    copies = conversions // (kernel.fit.tile.block_n // 4)  # of the softmax in the code
    assert conversions == copies * kernel.fit.tile.block_n // 4
    lines = sum(opcode == "FFMA.SAT" for opcode, _ in listing)
    assert bool(lines) == kernel.approximate
    assert exponentials + lines - 2 * conversions <= 4 * copies  # the factors of O
    assert sum(opcode.startswith("SHFL") for opcode, _ in listing) < 8 * copies


@needs_nvrtc
@pytest.mark.parametrize(
    ("head_dim", "blocks", "key_panel", "spilled"),
    [(64, (64, 128, 128), 128, 0), (128, (64, 128, 128), 128, 0), (128, (64, 192, 192), 64, 32), (256, (64, 96, 96), 32, 32)],
)
def test_the_quantiser_compiles_and_shuffles_only_between_the_lanes_of_a_row(code_of, head_dim, blocks, key_panel, spilled):
    """Where two CTAs leave 80 registers for 64 values an address or two is kept in memory, not a value."""
    pytest.importorskip("torch")
    from fasim.kernels.cuda.fp8 import quantise

    rows, lanes = quantise.tile_rows(blocks, head_dim), quantise.lanes_of(head_dim)
    ctas, slots = quantise.shares_of(head_dim, rows)
    report = (found := build.build(quantise.source(head_dim, True, rows, key_panel))).report
    assert report.spill_bytes <= spilled and report.remarks == () and slots >= 2
    assert report.registers * rows * lanes * ctas <= REGISTER_FILE
    assert ctas * (report.smem_bytes + quantise.RESERVED_BYTES) <= quantise.SMEM_BYTES
    opcodes = Counter(each.name for each in code_of(found.cubin).instructions)
    assert opcodes["SHFL"] == quantise.ELEMENTS[head_dim] * (lanes.bit_length() - 1)
    assert opcodes["UTMALDG"] and opcodes["UTMASTG"]


def test_a_tile_of_the_quantiser_is_whole_blocks_of_each_tensor():
    pytest.importorskip("torch")
    from fasim.kernels.cuda.fp8 import quantise

    rows = {blocks: quantise.tile_rows(blocks, 128) for blocks in ((64,), (16,), (64, 192, 192), (64, 96, 96), (8,), (7,), (272,))}
    assert list(rows.values()) == [64, 64, 192, 192, None, None, None]
    assert quantise.tile_rows((64, 96), 256) == 192 and quantise.tile_rows((16, 128), 128) == 128

    x = torch.zeros(2, 100, 3, 128, dtype=torch.bfloat16)
    flat, shape = x.view(-1), (1, 50, 3, 128)
    fits = [x, x.transpose(1, 2), x[:, ::2], flat[8:][: 50 * 384].view(shape)]
    columns_apart = torch.zeros(2, 9, 3, 256, dtype=torch.bfloat16)[..., ::2]
    refused = [columns_apart, flat[4:][: 50 * 384].view(shape), x[:, :0], x[..., :32]]
    assert all(quantise.takes([Part(each, 64)]) for each in fits)
    assert not any(quantise.takes([Part(each, 64)]) for each in refused)
    assert not quantise.takes([Part(x, 64)] * 4) and quantise.takes([Part(x, 64), Part(x, 192, True), Part(x, 192)])


READ = {
    "take": ["sync"],
    "give": ["hand over"],
    "issue_scores": ["wait", "S = Q K^T"],
    "issue_values": ["wait", "O += P V"],
    "free_k": ["arrive"],
    "free_v": ["arrive"],
}
"""What machine code shows of a verb in `step`; a wait for GEMMs says how many may still run."""


@needs_nvrtc
@each_exact
def test_the_loop_of_the_machine_code_is_two_of_the_steps_that_the_source_says(code, kernel):
    step = kernel.path.read_text().split("void step(")[1].split("\n}\n")[0]
    verbs = re.findall(r"wg\.(\w+)(?:<(\d)>)?\(", step)
    written = [what for verb, pending in verbs for what in ([f"gemms but {pending}"] if pending else READ.get(verb, []))]
    (loop,) = machine_code.loops(code)
    assert machine_code.order(loop.points) == 2 * written and len(written) >= 8  # nine with a turn taken


@needs_nvrtc
@each
def test_the_loop_of_the_machine_code_stands_in_the_order_that_the_schedule_says(code, kernel):
    """With approximate exponentials, which take no turns, in overlap-2stage's and not in fa3's."""
    workload = Workload(1, 1, 8448, kernel.head_dim, "e4m3", kernel.causal)
    order = "overlap-2stage" if kernel.approximate else kernel.schedule
    assert static.differs(code, order, workload, kernel.fit.tile) == ""
    if kernel.approximate:
        assert static.differs(code, kernel.schedule, workload, kernel.fit.tile)


def share_of_a_block(code, runs):
    """Instructions of one transposing warp for a block of V, of which it takes so many runs: the two loops around the LDSM."""
    edges = [(target, at) for at in range(len(code.instructions)) if (target := code.target(at)) is not None and target <= at]
    names = {edge: {each.name for each in code.instructions[edge[0] : edge[1] + 1]} for edge in edges}
    lengths = sorted(end - start + 1 for start, end in edges if "LDSM" in names[start, end] and "QGMMA" not in names[start, end])
    return lengths[0] * runs + lengths[1] - lengths[0]


@needs_nvrtc
@pytest.mark.parametrize(
    "kernel", [each for each in COMPILED if each.schedule == "fa3" and not (each.block_scales or each.two_levels)], ids=_named
)
def test_a_warp_that_transposes_v_issues_what_the_model_says(code, kernel):
    tile, workload = kernel.fit.tile, Workload(1, 1, 4 * kernel.fit.tile.block_n, kernel.head_dim, "e4m3")
    program = trace(SCHEDULES["fa3"].kernels[0], workload, tile, ((4, 0),))
    stream = program.stream(program.warps.index("transposers"))
    phases = [program.phases[row["record"]] for row in stream if program.labels[row["label"]] == "transpose V"]
    pipes = ("alu", "fma", "other", "matrices")
    modelled = sum(int(phase[pipe]) * int(phase["chunks"]) for phase in phases for pipe in pipes) / 4
    units = sum(each.name == "LDSM" for each in code.instructions)  # of a run
    runs = -(-tile.block_n * kernel.head_dim // (512 * units) // 3)
    assert modelled == pytest.approx(share_of_a_block(code, runs), rel=0.2)


def test_the_wrappers_name_every_width_once():
    text = header((64, 192))
    assert text.count("template <> struct Wgmma<") == 2
    assert text.count("m64n192k32.f32.e4m3.e4m3") == 2  # A from shared memory, A from registers
    assert "%95" in text and "m64n192k16" not in text


def gains_over_flash_attention_3(name):
    """The record and FlashAttention-3's time over each kernel's, by kernel, head_dim, length and mask."""
    recorded = json.loads((config.HERE.parents[2] / "traces" / "recorded" / "kernels" / name).read_text())
    times = {(row["kernel"], row["head_dim"], row["seqlen"], row["causal"]): row["median_ms"] for row in recorded["rows"]}
    return recorded, {case: times["FlashAttention-3", *case[1:]] / ms for case, ms in times.items() if "from bf16" not in case[0]}


@pytest.mark.parametrize(
    ("name", "kernel", "count", "worst", "means"),
    [
        ("fp8_h200.json", "fa3", 15, 1.06, {64: 1.09, 128: 1.09, 256: 1.07}),
        ("fp8_h200.json", "fa3, V as rows of keys", 15, 1.08, {64: 1.11, 128: 1.16, 256: 1.16}),
        ("fp8_h200.json", "fa3 approximate", 14, 1.12, {64: 1.2, 128: 1.16}),
        ("fp8_h200.json", "fa3 approximate, V as rows of keys", 14, 1.19, {64: 1.25, 128: 1.23}),
        ("fp8_turns_h200.json", "fa3", 18, 1.05, {64: 1.09, 128: 1.09, 256: 1.07}),
        ("fp8_turns_h200.json", "fa3, V as rows of keys", 18, 1.07, {64: 1.09, 128: 1.13, 256: 1.11}),
    ],
)
def test_each_recorded_row_is_faster_than_flash_attention_3(name, kernel, count, worst, means):
    own = {case[1:]: gain for case, gain in gains_over_flash_attention_3(name)[1].items() if case[0] == kernel}
    assert len(own) == count and min(own.values()) > worst
    for head_dim, least in means.items():
        assert statistics.geometric_mean(gain for case, gain in own.items() if case[0] == head_dim) > least


@pytest.mark.parametrize("name", ["fp8_h200.json", "fp8_turns_h200.json"])
def test_the_recorded_runs_are_of_these_kernels(name):
    """But for the turns that the second's producer of rows of keys still had."""
    recorded, _ = gains_over_flash_attention_3(name)
    older = {"config.py"} | ({"keyed/producer.cuh"} if name == "fp8_turns_h200.json" else set())
    for path, digest in recorded["kernel_sha256"].items():
        if not any(path.endswith(each) for each in older):
            assert hashlib.sha256((config.HERE.parents[2] / path).read_bytes()).hexdigest() == digest, path


def test_a_schedule_or_head_dim_without_an_fp8_kernel_is_refused():
    with pytest.raises(UsageError, match="no FP8 kernel"):
        config.config_for("overlap-3stage", "bf16", 128, False, 4096)
    with pytest.raises(UsageError, match="head_dim=96"):
        config.config_for("fa3", "bf16", 96, False, 4096)
    with pytest.raises(UsageError, match="gain nothing at head_dim=256"):
        config.config_for("fa3", "bf16", 256, False, 4096, approximate=True)
    with pytest.raises(UsageError, match="two_level at head_dim=256"):
        config.config_for("fa3", "bf16", 256, False, 4096, two_levels=True)


torch = pytest.importorskip("torch")
from fasim.kernels.fp8.quantise import Part  # noqa: E402


def tensors(heads=4, kv_heads=2, head_dim=128, dtype=torch.float8_e4m3fn):
    q = torch.zeros(2, 8, heads, head_dim).to(dtype)
    k = torch.zeros(2, 9, kv_heads, head_dim).to(dtype)
    return q, k, k


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": tensors(dtype=torch.float16)[0]}, "float8_e4m3fn"),
        ({"k": tensors(kv_heads=3)[1], "v": tensors(kv_heads=3)[1]}, "multiple"),
        ({"v": tensors()[1][:, :5]}, "must be equal"),
        ({"q": tensors(head_dim=64)[0]}, "head_dim"),
        ({"q_descale": torch.ones(2, 4)}, r"\(2, 2\)"),
        ({"v_descale": torch.ones(2, 2).double()}, "fp32"),
        ({"softmax_scale": -1.0}, "above 0"),
        ({"dtype": torch.float32}, "for O"),
        ({}, "CUDA device"),
    ],
)
def test_what_the_launcher_cannot_take_is_refused_in_one_sentence(change, message):
    from fasim.kernels.cuda.fp8.launch import forward

    q, k, v = tensors()
    with pytest.raises(UsageError, match=message) as refusal:
        forward(**({"q": q, "k": k, "v": v} | change))
    assert "\n" not in str(refusal.value)
