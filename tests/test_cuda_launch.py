"""What a launch decides on the host, tested without a GPU: which tensors TMA can read, the grid, the sections, the ABI."""

from __future__ import annotations

import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fasim.kernels import ops  # noqa: E402
from fasim.kernels.cuda import config, launch  # noqa: E402
from fasim.kernels.cuda.fp8 import launch as fp8_launch  # noqa: E402
from fasim.simulator.errors import UsageError  # noqa: E402
from fasim.simulator.problem.order import work_items  # noqa: E402
from fasim.simulator.problem.workload import Workload  # noqa: E402


def test_the_argument_block_has_the_layout_of_the_struct():
    """struct Params, read from the header by C's rules: every member naturally aligned."""
    (body,) = re.findall(r"struct Params \{(.*?)\};", "".join(config.headers().values()), re.DOTALL)
    codes = ""
    for line in re.sub(r"//.*", "", body).split(";"):
        if line.strip():
            members = line.split(",")
            codes += "P" * len(members) if "*" in line else ("f" if "float" in line else "i") * len(members)
    assert launch.PARAMS.format == "@" + codes


TENSORS = {
    "contiguous": (lambda x: x, True),
    "heads before rows": (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), True),
    "packed qkv": (lambda x: torch.stack((x, x, x), 2)[:, :, 1], True),
    "every second row": (lambda x: x.repeat(1, 2, 1, 1)[:, ::2], True),
    "one head for all": (lambda x: x[:, :, :1].expand(x.shape), True),
    "a slice of one head": (lambda x: x[:, :, :1], True),
    "rows of 65 elements": (lambda x: torch.cat((x, x[..., :1]), -1)[..., :64], False),
    "rows of 72 elements": (lambda x: torch.cat((x, x[..., :8]), -1)[..., :64], True),
    "head dim strided": (lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), False),
}


@pytest.mark.parametrize("name", TENSORS)
def test_what_tma_can_describe_is_read_in_place_and_the_rest_copied(name):
    make, expected = TENSORS[name]
    x = make(torch.randn(2, 3, 4, 64).half())
    operand = launch.Operand("fp16", tuple(x.shape), x.stride(), (64, 64))
    assert operand.copied is not expected
    seen = operand.readable(x)
    assert torch.equal(seen, x) and (seen.data_ptr() == x.data_ptr()) is expected
    assert all(step % 16 == 0 for step in operand.strides_bytes)
    flat = seen.as_strided(seen.shape, tuple(step // 2 for step in (*operand.strides_bytes[::-2], operand.strides_bytes[1], 2)))
    assert flat.shape == x.shape and torch.equal(flat, x)


OFF_BASE = {
    "contiguous": lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape),
    "columns 1 to 64 of 72": lambda x: torch.cat((x[..., :1], x, x[..., :7]), -1)[..., 1:65],
    "heads before rows": lambda x: torch.cat((x, x[..., :8]), -1).transpose(1, 2).contiguous().transpose(1, 2)[..., 1:65],
    "one head for all": lambda x: torch.cat((x[:, :, :1, :1], x[:, :, :1], x[:, :, :1, :7]), -1)[..., 1:65].expand(x.shape),
    "negated lazily": lambda x: torch._neg_view(torch.cat((x[..., :1], x, x[..., :7]), -1)[..., 1:65]),
}


def described(operand, x):
    """What the operand's tensor map has TMA read from x's address."""
    element = x.element_size()
    head_dim, rows, heads, batch = operand.sizes
    row, head, of_batch = (step // element for step in operand.strides_bytes)
    return x.detach().as_strided((batch, rows, heads, head_dim), (of_batch, row, head, 1))


@pytest.mark.parametrize("name", OFF_BASE)
def test_a_base_off_16_bytes_is_copied_to_what_the_tensor_map_describes(name):
    x = OFF_BASE[name](torch.randn(2, 3, 4, 64).half())
    operand = launch.Operand("fp16", tuple(x.shape), x.stride(), (64, 64))
    assert x.data_ptr() % 16 and not operand.copied
    seen = operand.readable(x)
    assert seen.data_ptr() % 16 == 0 and torch.equal(seen, x) and torch.equal(described(operand, seen), x)


def test_an_fp8_base_off_16_bytes_is_copied_to_what_the_tensor_map_describes():
    x = torch.randn(2, 3, 4, 80).to(torch.float8_e4m3fn)[..., 1:65]
    operand = fp8_launch._Operand("e4m3", tuple(x.shape), x.stride(), (64, 64))
    assert x.data_ptr() % 16 and not operand.copied
    seen = operand.readable(x)
    assert seen.data_ptr() % 16 == 0 and torch.equal(described(operand, seen).float(), x.float())


@pytest.mark.parametrize("seqlen_k", [1, 500, 4096, 16384, 1 << 20])
@pytest.mark.parametrize("kv_heads", [1, 4, 8])
def test_sections_are_those_of_the_simulator(seqlen_k, kv_heads):
    workload = Workload(4, 8, seqlen_q=384, seqlen_k=seqlen_k, head_dim=128, causal=True, kv_heads=kv_heads)
    heads = work_items(workload, 128, 128, "longest-first")["q_head"]
    walked_together = int(np.argmax(heads == 0) if heads[0] else np.flatnonzero(heads == 0)[1])  # head 0 returns after a section
    assert min(launch.section_heads(seqlen_k, 128, workload.heads_per_kv), 4 * 8) == walked_together


@pytest.mark.parametrize(
    ("heads", "m_tiles", "cluster", "sms", "expected"),
    [(64, 66, 1, 132, 132), (1, 5, 1, 132, 5), (1, 5, 2, 132, 6), (3, 1, 2, 132, 6), (64, 66, 2, 113, 112), (1, 1, 2, 1, 2)],
)
def test_the_grid_is_persistent_and_whole_clusters(heads, m_tiles, cluster, sms, expected):
    assert launch.grid_of(heads, m_tiles, cluster, sms) == expected


def test_a_cuda_schedule_refuses_a_cpu_tensor_in_one_sentence():
    q = torch.zeros(1, 4, 1, 64).half()
    for schedule in ops.SCHEDULES[len(ops.TRITON) :]:
        with pytest.raises(UsageError, match=f"the '{schedule}' kernel runs on an H100 or H200"):
            ops.flash_attn_func(q, q, q, schedule=schedule)


def test_auto_is_fa3_where_its_kernel_can_be_had_and_fa2_elsewhere(monkeypatch):
    q = torch.zeros(1, 4, 1, 64).half()
    assert ops._resolve("auto", q, False) == "fa2"
    expected = {(9, 0): "fa3", (8, 0): "fa2", (10, 0): "fa2"}
    for capability, name in expected.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        monkeypatch.setattr(ops.build, "compiler_version", lambda: "13.0")
        ops._fastest.cache_clear()
        assert ops._fastest(0, torch.float16, 128, False) == (name if "fa3" in ops.SCHEDULES else "fa2")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(ops.build, "compiler_version", lambda: None)
    monkeypatch.setattr(ops.build, "lookup", lambda source: None)
    ops._fastest.cache_clear()
    assert ops._fastest(0, torch.float16, 128, False) == "fa2"
    ops._fastest.cache_clear()
