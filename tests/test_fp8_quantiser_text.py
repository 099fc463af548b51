"""The quantiser's kernel on the CPU: its own text, compiled by g++ over a CTA of threads, gives the bits of plain torch.

Only what is PTX in it is replaced (quantiser_on_cpu.h): swizzles, slots, barriers, masks and arithmetic are the kernel's.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)

from fasim.kernels.cuda.fp8 import quantise as streamed  # noqa: E402
from fasim.kernels.fp8 import plain  # noqa: E402
from fasim.kernels.fp8.keyed import as_rows_of_keys  # noqa: E402
from fasim.kernels.fp8.plain import Part  # noqa: E402
from fasim.kernels.fp8.rotation import normaliser  # noqa: E402

SHIM = Path(__file__).with_name("quantiser_on_cpu.h")
SEED, CTAS = 3, 2
REPLACED = ("anew", "load_16_bytes", "load_words", "store_16_bytes", "mbarrier_arrive_often")
"""Functions of the kernel's text that are an instruction."""
MAP = struct.Struct("@P8q3i")
GO = """
inline u32 anew(u32 x) { return x; }
extern "C" void go(const Maps* maps, const Operands* p, int ctas) {
  cta_threads = THREADS, gridDim.x = ctas;
  shared_memory = (unsigned char*)std::aligned_alloc(1024, (sizeof(Shared) + 1023) / 1024 * 1024);
  for (blockIdx.x = 0; blockIdx.x < ctas; ++blockIdx.x) {
    std::memset(shared_memory, 0xff, sizeof(Shared));
    the_warps.clear(), mbarriers.clear();
    for (int i = 0; i < WARPS; ++i) the_warps.emplace_back(new Warp);
    std::vector<std::thread> threads;
    for (int i = 0; i < THREADS; ++i)
      threads.emplace_back([=] { threadIdx.x = i, attention_forward(*maps, *p); });
    for (auto& each : threads) each.join();
  }
  std::free(shared_memory);
}
"""


def library(source, folder):
    """The kernel as a shared library with `go`."""
    text = source.text.replace('#include "ptx_fp8.cuh"', f'#include "{SHIM}"\nu32 anew(u32);')
    for name in REPLACED:
        text = re.sub(r"__device__ __forceinline__ \w+ " + name + r"\(.*?\n}\n", "", text, flags=re.S)
    text = re.sub(r'asm volatile\("cp.async.bulk.wait_group 0;".*?;\n', "", text)
    text = re.sub(r"    asm\(.*?;\n", "    wrong();\n", text, flags=re.S).replace("wrong();", 'wrong("fp16 is not here");')
    text = text.replace("extern __shared__ __align__(1024) unsigned char memory[];", "unsigned char* memory = shared_memory;")
    text = text.replace('extern "C" __global__', "static inline")
    (folder / "kernel.cpp").write_text(text + GO)
    defines = [f"-D{name}={value}" for name, value in source.defines.items()]
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", "-w"]
    subprocess.run(["g++", *flags, *defines, "kernel.cpp", "-o", "kernel.so"], cwd=folder, check=True, capture_output=True)
    return ctypes.CDLL(str(folder / "kernel.so"))


def mapped(operand, tensor):
    """A tensor map as the shim has it."""
    size = {"bf16": 2, "e4m3": 1}[operand.dtype]
    packed = MAP.pack(tensor.data_ptr(), *operand.sizes, size, *operand.strides_bytes, *operand.box[:2], size)
    return packed.ljust(-(-len(packed) // 64) * 64, b"\0")


def quantised(parts, folder, monkeypatch):
    """Values and descales as the kernel on the CPU writes them over other bytes."""
    first = parts[0].x
    head_dim = first.shape[3]
    monkeypatch.setattr(streamed, "kernel_for", lambda *chosen: type("Kernel", (), {"ctas": CTAS, "chosen": chosen}))
    monkeypatch.setattr(streamed.launch, "sm_count", lambda device: 1)
    said = [(tuple(part.x.shape), part.x.stride(), part.block, part.hadamard, part.powers, part.keyed) for part in parts]
    plan = streamed.Plan(said, head_dim, True, 0)
    found = [
        (torch.full(values, 0x55, dtype=torch.uint8).view(torch.float8_e4m3fn), torch.full(descales, -7.0))
        for values, descales in plan.shapes
    ]
    operands = [streamed.OPERAND.pack(descale.data_ptr(), *sizes) for (_, descale), sizes in zip(found, plan.sizes, strict=True)]
    maps = [mapped(*each) for each in zip(plan.inputs, [part.x for part in parts], strict=True)]
    outs = [mapped(*each) for each in zip(plan.outputs, [values for values, _ in found], strict=True)]
    unused = streamed.MOST - len(parts)
    maps, operands = [*maps, *[maps[-1]] * unused, *outs, *[outs[-1]] * unused], operands + [operands[-1]] * unused
    flips = streamed.sign_bits(head_dim, SEED, torch.device("cpu"))
    params = b"".join(operands) + streamed.TAIL.pack(flips.data_ptr(), normaliser(head_dim), plan.tiles)
    boxes = torch.frombuffer(bytearray(b"".join(maps) + bytes(64)), dtype=torch.uint8)
    start = -boxes.data_ptr() % 64
    boxes[start : start + len(maps) * len(maps[0])] = boxes[: len(maps) * len(maps[0])].clone()
    source = streamed.source(head_dim, True, plan.rows, plan.kernel.chosen[3])
    library(source, folder).go(ctypes.c_void_p(boxes.data_ptr() + start), params, min(plan.grid, plan.tiles))
    return found


@pytest.mark.parametrize(("head_dim", "block", "elements"), [(64, 128, 64), (128, 192, 64), (256, 96, 64), (256, 96, 128)])
def test_q_k_and_v_across_in_one_launch_have_the_bits_of_plain_torch(head_dim, block, elements, tmp_path, monkeypatch):
    """More tiles than CTAs and slots, ragged ends, a block of zeros, what e4m3 has not."""
    monkeypatch.setitem(streamed.ELEMENTS, head_dim, elements)
    generator = torch.Generator().manual_seed(head_dim)
    lengths = (130, 199) if head_dim == 256 else (300, 407)
    q, k, v = (torch.randn(1, lengths[i], 2 - i, head_dim, generator=generator).bfloat16() for i in (0, 1, 1))
    k[0, 5, 0, 3], q[0, 3, 1, 9], v[0, 50, 0, 7], v[0, block:] = float("inf"), -float("inf"), float("nan"), 0.0
    parts = [Part(q, 64, True), Part(k, block, True), Part(v, block, powers=True, keyed=True)]
    assert streamed.takes(parts)
    for part, (values, descale) in zip(parts, quantised(parts, tmp_path, monkeypatch), strict=True):
        wanted = plain.quantise(part.x, part.block, hadamard=part.hadamard, seed=SEED, powers=part.powers)
        laid = as_rows_of_keys(wanted.values) if part.keyed else wanted.values
        assert torch.equal(values.view(torch.uint8), laid.view(torch.uint8))
        assert torch.equal(descale, wanted.descale)


def test_a_row_of_other_strides_is_read_as_it_lies(tmp_path, monkeypatch):
    x = torch.randn(1, 300, 2, 128, generator=torch.Generator().manual_seed(1)).bfloat16()[:, ::2]
    ((values, descale),) = quantised([Part(x, 64, True)], tmp_path, monkeypatch)
    wanted = plain.quantise(x, 64, hadamard=True, seed=SEED)
    assert torch.equal(values.view(torch.uint8), wanted.values.view(torch.uint8)) and torch.equal(descale, wanted.descale)
