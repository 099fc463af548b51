"""What Gluon lacks or breaks on Hopper, each as the least kernel that shows it; `python gluon_limits.py` prints it as JSON.

A program of its own, for test_gluon.py: Triton's interpreter, once chosen for other tests, is chosen for Gluon's library too.
"""

from __future__ import annotations

import json
import sys
import warnings

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from fasim.kernels.compile import disassemble


@gluon.constexpr_function
def tile():
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@gluon.constexpr_function
def accumulator():
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])


@gluon.jit
def scores_of(q, k):
    return warpgroup_mma(q, k, gl.zeros([64, 64], gl.float32, accumulator()), use_acc=False, is_async=True)


@gluon.jit
def in_flight_where_the_loop_turns(out, n):
    """S of the next step is issued before the loop turns, and awaited after."""
    q = gl.allocate_shared_memory(gl.bfloat16, [64, 64], tile())
    k = gl.allocate_shared_memory(gl.bfloat16, [64, 64], tile())
    layout: gl.constexpr = accumulator()
    scores = scores_of(q, k)
    running = warpgroup_mma(q, k, gl.zeros([64, 64], gl.float32, layout), is_async=True)
    for _ in range(n):
        weights = gl.exp2(warpgroup_mma_wait(1, deps=[scores]))
        acc, weights = warpgroup_mma_wait(0, deps=[running, weights])
        scores = scores_of(q, k)
        operand = gl.convert_layout(weights.to(gl.bfloat16), gl.DotOperandLayout(0, layout, 2))
        running = warpgroup_mma(operand, k, acc, is_async=True)
    last = warpgroup_mma_wait(0, deps=[scores])
    acc = warpgroup_mma_wait(0, deps=[running])
    gl.store(out + gl.arange(0, 64, layout=gl.SliceLayout(1, layout)), gl.sum(acc + last, 1))


@gluon.jit
def softmax_under_a_product(out, n):
    """The exponentials are written before the wait for the product that they are to run under."""
    q = gl.allocate_shared_memory(gl.bfloat16, [64, 64], tile())
    k = gl.allocate_shared_memory(gl.bfloat16, [64, 64], tile())
    layout: gl.constexpr = accumulator()
    acc = gl.zeros([64, 64], gl.float32, layout)
    weights = gl.zeros([64, 64], gl.float32, layout)
    for _ in range(n):
        operand = gl.convert_layout(weights.to(gl.bfloat16), gl.DotOperandLayout(0, layout, 2))
        scores = scores_of(q, k)
        acc = warpgroup_mma(operand, k, acc, is_async=True)
        weights = gl.exp2(warpgroup_mma_wait(1, deps=[scores]))
        acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
    gl.store(out + gl.arange(0, 64, layout=gl.SliceLayout(1, layout)), gl.sum(acc, 1))


@gluon.jit
def arrive(out, n):
    """Five arrivals at an mbarrier."""
    bar = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bar.index(0), count=1)
    for _ in gl.static_range(5):
        mbarrier.arrive(bar.index(0), count=1)


@gluon.jit
def wait_again(out, n):
    """An mbarrier awaited in five phases, one after the other."""
    bar = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(5):
        mbarrier.wait(bar.index(0), i & 1)


@gluon.jit
def ninety_six_keys(out, n):
    """An accumulator of 96 columns, which WGMMA has."""
    gl.zeros([64, 96], gl.float32, accumulator())


def instructions(kernel) -> list[str]:
    """Opcodes and operands of a kernel, in order."""
    source = GluonASTSource(kernel, {"out": "*fp32", "n": "i32"}, {}, {})
    compiled = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    (code,) = disassemble.of_cubin(compiled.asm["cubin"])
    return [f"{each.opcode} {each.operands}" for each in code.instructions]


def main() -> None:
    warnings.simplefilter("ignore")
    found = {}
    code = instructions(in_flight_where_the_loop_turns)
    found["gemms"] = sum("HGMMA" in each for each in code)
    found["fences"] = sum("WARPGROUP.ARRIVE" in each for each in code)
    code = instructions(softmax_under_a_product)
    waits = [number for number, each in enumerate(code) if "DEPBAR" in each and "gsb0" in each]
    exponentials = [number for number, each in enumerate(code) if "MUFU.EX2" in each]
    found["exponentials"], found["behind"] = len(exponentials), sum(number > waits[1] for number in exponentials)
    code = instructions(arrive)
    found["barriers"] = sum(each.startswith("BAR.SYNC") for each in code)
    code = instructions(wait_again)
    found["between waits"] = sum(each.startswith("BAR.SYNC") for each in code)
    try:
        instructions(ninety_six_keys)
        found["columns"] = "any"
    except Exception as error:
        while error.__cause__:
            error = error.__cause__
        found["columns"] = "powers of two" if "power of 2" in str(error) else str(error)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
