"""Kernels without a producer: Triton's fa2, by WGMMA and by mma.sync, compiled here and predicted from machine code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from fasim.kernels.compile import disassemble
from fasim.kernels.compile.inspect import inspect
from fasim.kernels.compile.kernel_file import pipeline_of
from fasim.simulator.code import alone, loop_reader, sass
from fasim.simulator.code.compiled import code_of
from fasim.simulator.code.estimate import SHIPPED
from fasim.simulator.code.pipeline import Pipeline
from fasim.simulator.code.sass import Code, Instruction, Point
from fasim.simulator.predict import laid_out, predict
from fasim.simulator.problem.workload import Workload
from fasim.simulator.schedules import UsageError, adopt

COMPILE = """
import pathlib, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fasim.kernels.triton import fa2
from fasim.kernels.triton.tiles import FORWARD, TritonTile

names = fa2._forward.arg_names
full = FORWARD[128, "full"]
for name, architecture, tile in (("90", 90, full), ("80", 80, full), ("walks", 90, TritonTile(64, 64, 4, 3))):
    hopper, causal = architecture == 90, name == "walks"
    fixed = dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, HEAD_DIM=128, CAUSAL=causal, WHOLE=False)
    fixed |= dict(TMA=hopper, OVERLAPPED=hopper and not causal)
    fixed |= {name: 1 for name in names if name.endswith("stride_d") or name == "TOGETHER"}
    types = {**dict.fromkeys("qkvo", "*fp16"), "lse": "*fp32", "scale_log2": "fp32"}
    if hopper:
        types |= {name: f"tensordesc<fp16[1,1,{rows},128]>" for name, rows in
                  zip("qkv", (tile.block_m, tile.block_n, tile.block_n))}
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
    whole = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names)
             if name not in fixed and (signature[name][0] == "*" or "stride" in name)}
    source = ASTSource(fa2._forward, signature, fixed, whole)
    built = triton.compile(source, GPUTarget("cuda", architecture, 32), tile.options())
    (pathlib.Path(sys.argv[1]) / f"{name}.cubin").write_bytes(built.asm["cubin"])
"""


@pytest.fixture(scope="module")
def cubins(tmp_path_factory):
    pytest.importorskip("triton")
    try:
        disassemble.tool("nvdisasm")
    except disassemble.MissingDisassembler:
        pytest.skip("no disassembler: it comes with CUDA and with Triton's wheel")
    folder = tmp_path_factory.mktemp("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return folder


KINDS = {"90": ("tma", False, "128x128"), "80": ("cp_async", True, "128x128")}


@pytest.mark.parametrize("architecture", KINDS)
def test_a_triton_kernels_tile_stages_and_order_are_read_and_predicted(cubins, architecture):
    loads, synchronous, tile = KINDS[architecture]
    path = cubins / f"{architecture}.cubin"
    workload = Workload(1, 16, 2048, 128, "fp16")
    found = pipeline_of(str(path), workload)
    assert (found.loads, found.synchronous, found.stages, found.head_dim, found.consumers) == (loads, synchronous, 3, 128, 2)
    assert found.blocks[0].pipes["mufu"] == 66 and found.looks_for_maximum  # 64 scores of a thread, and two rows' factors
    lags = {(step.what, step.tensor): step.lag for step in found.blocks[0].steps if not step.code}
    assert lags["values", "V"] == (0 if synchronous else 1) and lags["load", "K"] == -2
    schedule = adopt(f"alone {architecture}", found)
    assert str(schedule.tile) == tile
    ours, nearest = (predict(workload, name, "h200", clock_hz=1.5e9).cycles for name in (schedule.name, "fa2"))
    assert nearest / 2 < ours < 2 * nearest
    (code,) = disassemble.kernels_of(path)
    assert inspect(code).reads_as.startswith("tile 128x128, d128") and "3 stages" in inspect(code).reads_as


def test_what_runs_once_a_tile_is_read_with_its_loads(cubins):
    """Q is awaited before the first K; the last V is asked for behind the loop, where its product is."""
    found = pipeline_of(str(cubins / "90.cubin"), Workload(1, 16, 2048, 128))
    words = [[step.what for step in steps if not step.code] for steps in (found.before, found.after)]
    loads = [at for at, word in enumerate(words[0]) if word == "load"]
    assert loads[0] < words[0].index("wait") < loads[1] and len(loads) == 5
    assert [word for word in words[1] if word != "meet"] == ["finished", "load", "wait", "values", "finished"]
    assert 350 < sum(part.instructions for step in found.before for part in step.code) < 550
    assert Pipeline.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    short = Workload(32, 16, 512, 128)
    bare = adopt("bare", replace(found, before=(), between=(), after=()))
    whole = adopt("whole", found)
    per_tile = [predict(short, name.name, "h200", clock_hz=1.5e9, spans=False).cycles * 132 / 2048 for name in (whole, bare)]
    assert 2_000 < per_tile[0] - per_tile[1] < 12_000


def test_a_second_walk_has_its_stages_and_asks_for_its_blocks_anew(cubins):
    causal = Workload(32, 16, 512, 128, causal=True)
    found = pipeline_of(str(cubins / "walks.cubin"), causal)
    assert (found.stages, found.consumers, found.block_n) == (3, 1, 64) and found.masked
    assert [step.what for step in found.between].count("load") == 4
    two, one = (adopt(name, replace(found, between=steps)) for name, steps in (("two", found.between), ("one", ())))
    cycles = [predict(causal, each.name, "h200", clock_hz=1.5e9, spans=False).cycles for each in (two, one)]
    assert cycles[0] > 1.02 * cycles[1]


def instruction(opcode: str, operands: str = "") -> Instruction:
    return Instruction(0, "", opcode, operands, 1, (7, 7), 0)


def mma_sync(products: int, exponentials: int, name: str = "kernel", threads: int = 128) -> Code:
    """A loop of so many mma.sync and exponentials."""
    body = [instruction("DEPBAR.LE", "SB0, 0x0"), *[instruction("HMMA.16816.F32")] * (products // 2)]
    body += [instruction("MUFU.EX2")] * exponentials + [instruction("HMMA.16816.F32")] * (products // 2)
    return Code(name, (*body, instruction("BRA", "`(.L_x_0)")), {".L_x_0": 0}, threads)


def test_a_tile_follows_from_how_many_products_and_exponentials_a_block_has():
    """FlashAttention-2's at d128: 128 rows of four warps, 64 keys; its kernels have no launch bounds, but warps in their name."""
    named = mma_sync(256, 68, "x23Flash_fwd_kernel_traitsILi128ELi128ELi64ELi4ELb0E", threads=0)
    for code in (mma_sync(256, 68), named):
        found = alone.by_mma(code, sass.loops(code))
        assert (found.rows, found.consumers, found.block_n, found.head_dim, found.stages) == (128, 1, 64, 128, 1)
    unknown = mma_sync(256, 68, threads=0)
    with pytest.raises(UsageError, match="how many consumer warpgroups a CTA has cannot be read: give --tile"):
        adopt("unknown", alone.by_mma(unknown, sass.loops(unknown)))
    other = mma_sync(250, 99)
    with pytest.raises(UsageError, match="no tile makes 250 mma.sync and 99 exponentials"):
        alone.by_mma(other, sass.loops(other))


def test_stages_are_how_far_empty_barriers_lie_behind_full_ones():
    """Eight bytes a barrier; what no instruction says is 0."""
    rings = ((0, 0x100), (2, 0x130))
    points = [point for at, full in rings for point in (Point("wait", at, place=full), Point("arrive", at + 1, place=full + 0x18))]
    assert alone.stages_of(points) == 3
    assert alone.stages_of([Point("wait", 0), Point("arrive", 1, place=0x118)]) == 0


def wgmma_attention(*more: Instruction) -> Code:
    """A loop of S = Q K^T and O += P V by WGMMA."""
    scores = instruction("HGMMA.64x64x16.F32", "R0, gdesc[UR4], RZ, !UPT, gsb0")
    values = instruction("HGMMA.64x64x16.F32", "R32, R64, gdesc[UR4].tnspB, R32, gsb0")
    body = (scores, instruction("WARPGROUP.DEPBAR.LE", "gsb0, 0x0"), values, instruction("WARPGROUP.DEPBAR.LE", "gsb0, 0x0"))
    return Code("kernel", (*body, *more, instruction("BRA", "`(.L_x_0)")), {".L_x_0": 0}, 128)


def test_a_loop_that_writes_to_memory_at_every_block_is_no_forward_of_one_walk():
    with pytest.raises(UsageError, match="its loop writes to memory at every block, as FlashAttention-1's"):
        loop_reader.read(wgmma_attention(instruction("STG.E", "desc[UR4][R2.64], R7")))
    with pytest.raises(UsageError) as raised:
        loop_reader.read(wgmma_attention())
    assert "writes to memory" not in str(raised.value)
    with pytest.raises(UsageError, match="of an attention in several kernels standard"):
        loop_reader.read(Code("kernel", (instruction("STG.E", "R1, R2"),), {}))


def test_what_stands_around_a_load_of_ones_own_is_in_the_code_that_was_read():
    """A producer's, which is not read, is estimated."""
    code = code_of(alone.by_mma(mma_sync(256, 68), sass.loops(mma_sync(256, 68))))
    assert code.pen(0).load() == [] and code.pen(-1).load() == SHIPPED.pen(-1).load()


def test_what_is_spilled_is_counted_by_the_block_and_once_a_tile():
    """Words on the way through the loop, and those that only lie at other addresses; it is kept and taken to L2."""
    code = mma_sync(256, 68)
    stores = [("STL", "[R1+0x10], R3"), ("STL.64", "[R1+0x18], R4"), ("STL.128", "[R1], R8")]
    first, second, before = (instruction(*each) for each in stores)
    again = instruction("STL", "[R1+0x10], R5")
    spilling = Code(code.name, (before, again, first, second, *code.instructions), {".L_x_0": 2}, 128)
    found = alone.by_mma(spilling, sass.loops(spilling))
    assert found.spilled == (3, 4) and Pipeline.from_dict(found.to_dict()).spilled == (3, 4)
    work = Workload(1, 4, 640, 128, "fp16")
    assert laid_out(work, adopt("spilling", found).name, "h200").traffic.by_tensor["spilled"].l2_write == 20 * 512 * (10 * 3 + 4)
    assert code_of(alone.by_mma(code, sass.loops(code))).spilled(128, False) is None
