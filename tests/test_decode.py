"""Few queries against many keys: packed heads and keys in parts give the oracle's O and LSE, whatever the number of parts."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("triton_env", Path(__file__).with_name("triton_env.py"))
env = sys.modules.setdefault("triton_env", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(env)

import torch  # noqa: E402

from fasim.kernels import ops, reference  # noqa: E402
from fasim.kernels.compile import disassemble  # noqa: E402
from fasim.kernels.decode import kernel as decode  # noqa: E402
from fasim.kernels.decode import operator as few_queries  # noqa: E402
from fasim.kernels.decode import splits  # noqa: E402
from fasim.kernels.ops import flash_attn_func  # noqa: E402
from fasim.simulator.errors import UsageError  # noqa: E402
from fasim.simulator.problem.tile import Tile  # noqa: E402
from fasim.simulator.problem.workload import Workload  # noqa: E402
from fasim.traces import static  # noqa: E402

HALF, BRAIN = torch.float16, torch.bfloat16
# batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim, causal, dtype, num_splits
CASES = [
    (2, 2, 2, 1, 37, 64, False, HALF, 1),
    (1, 8, 2, 1, 50, 64, False, BRAIN, 2),
    (1, 8, 1, 3, 83, 64, True, HALF, 5),  # the queries end within the last two parts
    (2, 16, 1, 1, 33, 64, True, HALF, 9),  # parts of nothing
    (1, 16, 1, 8, 40, 64, True, BRAIN, 2),  # 128 packed rows: eight tiles
    (1, 4, 1, 8, 5, 64, True, HALF, 3),  # rows without keys
    (1, 4, 2, 2, 0, 64, False, HALF, 2),  # no keys
    (1, 8, 1, 5, 35, 128, True, BRAIN, 3),
    (1, 4, 1, 1, 49, 256, False, HALF, 4),
    (1, 1, 1, 2, 7, 64, True, HALF, 40),  # more parts than one step of the combine takes
]


def name_of(case):
    batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim, causal, dtype, parts = case
    mask = "causal" if causal else "full"
    return f"{batch}x{heads}/{kv_heads}x{seqlen_q}/{seqlen_k}-d{head_dim}-{mask}-{str(dtype)[6:]}-{parts}"


def check(o, lse, expected, dtype):
    assert o.dtype == dtype and lse.dtype == torch.float32 and lse.shape == expected.lse.shape
    assert env.relative_error(o, expected.o) < (1e-3 if dtype == HALF else 8e-3)
    dead = expected.lse == -math.inf
    assert torch.equal(lse == -math.inf, dead) and (o.transpose(1, 2)[dead] == 0).all()
    torch.testing.assert_close(lse[~dead].double(), expected.lse[~dead], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_any_number_of_parts_equals_the_oracle(case):
    *shape, causal, dtype, parts = case
    q, k, v, _ = env.inputs(*shape, dtype)
    o, lse = decode.forward(q, k, v, 0.11, causal, num_splits=parts)
    check(o, lse, reference.attention_forward(q, k, v, 0.11, causal), dtype)


@pytest.mark.parametrize("scale", [None, 0.0, -0.3])
def test_num_splits_of_flash_attn_func_asks_for_the_parts_at_any_scale_and_strides(scale):
    q, k, v, _ = env.inputs(1, 4, 2, 3, 37, 64)
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    by_column = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    expected = reference.attention_forward(q, k, v, scale, True)
    for tensors in ((q, k, v), by_head, by_column):
        check(*flash_attn_func(*tensors, scale, True, return_lse=True, num_splits=2), expected, HALF)


def test_the_gradients_of_both_outputs_are_the_oracles():
    q, k, v, do = env.inputs(1, 4, 1, 2, 21, 64)
    dlse = torch.randn(1, 4, 2, generator=torch.Generator().manual_seed(1)).to(q.device)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    outputs = flash_attn_func(*leaves, 0.2, True, return_lse=True, num_splits=2)
    got = torch.autograd.grad(outputs, leaves, (do, dlse))
    for ours, theirs in zip(got, reference.attention_backward(q, k, v, do, 0.2, True, dlse), strict=True):
        assert env.relative_error(ours, theirs) < 3e-3


def test_a_nan_in_one_part_reaches_the_rows_that_see_it():
    q, k, v, _ = env.inputs(1, 2, 1, 4, 40, 64)
    k[0, 39, 0, 3] = math.nan  # seen by the last query alone
    o, lse = decode.forward(q, k, v, 0.125, True, num_splits=3)
    assert o[0, :3].isfinite().all() and lse[0, :, :3].isfinite().all()
    assert o[0, 3].isnan().all() and lse[0, :, 3].isnan().all()


def test_opcheck_and_torch_compile():
    q, k, v, _ = env.inputs(1, 4, 2, 1, 20, 64)
    torch.library.opcheck(few_queries.decode, (q.clone().requires_grad_(), k, v, 0.125, False, 2))

    def model(q, k, v):
        return flash_attn_func(q * 2, k, v, num_splits=2) + 1

    backend = "inductor" if env.DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend)(q, k, v)
    torch.testing.assert_close(compiled, model(q, k, v), rtol=2e-3, atol=2e-3)


def test_a_binary_is_looked_for_once_where_the_arguments_are_alike(monkeypatch):
    """In place of Triton: what its first launch returns is launched again, by grid, addresses and stream."""
    launches = []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments, **given: launches.append(("kept", grid, arguments, given))

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launches.append(("sought", grid, arguments, options)) or Compiled()

    monkeypatch.setattr(decode, "_kept", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 70 + device, raising=False)
    x, kernel, one, other = torch.zeros(3), Kernel(), ("a",), ("b",)
    for same in ((HALF, 0, one), (HALF, 0, one), (HALF, 0, other), (BRAIN, 0, one), None, None):
        decode._launch(kernel, same, 5, (x,), (1, 2), {"num_warps": 4})
    assert [launch[0] for launch in launches] == ["sought", "kept", "sought", "sought", "sought", "sought"]
    assert launches[0][1:] == ((5,), (x, 1, 2), {"num_warps": 4})
    assert launches[1][1:] == ((5, 1, 1), (x.data_ptr(), 1, 2), {"stream": 70})


REFUSED = {
    "num_splits=0 is not possible: give a whole number from 1 to 256": {"num_splits": 0},
    "num_splits=257 is not possible": {"num_splits": 257},
    "num_splits=2.0 is not possible": {"num_splits": 2.0},
    "num_splits=True is not possible": {"num_splits": True},
    "schedule='fa2' does not walk its keys in parts": {"num_splits": 2, "schedule": "fa2"},
    "num_splits is for float16 and bfloat16": {"num_splits": 2, "q_descale": torch.ones(1, 1)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_num_splits_cannot_be_is_said_in_one_sentence(message):
    q = torch.zeros(1, 2, 1, 64, dtype=HALF, device=env.DEVICE)
    with pytest.raises(UsageError) as caught:
        flash_attn_func(q, q, q, **REFUSED[message])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("keys", [4 << 10, 32 << 10, 128 << 10])
def test_the_chosen_parts_fill_the_sms_and_none_is_empty(batch, keys):
    """8 K/V heads at head_dim 128 on 132 SMs."""
    tile, tiles, parts = splits.choose(128, 4, batch * 8, keys, 132)
    assert tiles == batch * 8 and parts <= keys // tile.block_n
    if batch == 64 and keys > 4 << 10:
        assert (tile.num_stages, parts) == (3, 4)  # 2048 CTAs, three to an SM: 5.2 waves
        return
    assert tile == splits.decode_tile(128, 4, interpreted=False)
    assert parts == {1: 16, 8: 2, 64: 1}[batch]  # 128, 128 and 512 CTAs: 0.97 of one wave, of one and of four


@pytest.mark.parametrize(
    ("batch", "keys", "stages", "parts"),
    [(12, 10_000, 3, 2), (24, 10_000, 3, 1), (24, 49_152, 3, 4), (3, 10_000, 4, 5), (16, 10_000, 4, 1), (32, 10_000, 4, 1)],
)
def test_where_ctas_would_lie_unevenly_on_the_sms_three_share_one(batch, keys, stages, parts):
    """96 and 192 tiles: 384 CTAs of four stages, two to an SM, took 139 and 268 us where these take 116 and 222."""
    tile, tiles, chosen = splits.choose(128, 4, batch * 8, keys, 132)
    assert (tile.num_stages, chosen) == (stages, parts)
    ctas = tiles * chosen
    assert ctas <= 132 or ctas > 1.9 * 132 or (stages == 3 and ctas > 1.35 * 132)


@pytest.mark.parametrize(
    ("batch", "keys", "stages", "parts"), [(8, 32 << 10, 3, 4), (8, 128 << 10, 3, 4), (1, 32 << 10, 3, 32), (1, 4 << 10, 3, 32)]
)
def test_where_pages_are_looked_up_two_ctas_share_an_sm(batch, keys, stages, parts):
    tile, tiles, chosen = splits.choose(128, 4, batch * 8, keys, 132, paged=True)
    assert (tile.num_stages, chosen) == (stages, parts) and 132 < tiles * chosen <= 2 * 132


def test_pages_change_nothing_where_tiles_are_many_or_another_tile_was_not_measured():
    for head_dim, rows, heads, keys in ((128, 4, 512, 4096), (128, 4, 512, 32 << 10), (64, 4, 64, 4096), (128, 64, 64, 4096)):
        assert splits.choose(head_dim, rows, heads, keys, 132, paged=True) == splits.choose(head_dim, rows, heads, keys, 132)


def test_one_part_where_there_is_nothing_to_divide():
    assert splits.splits_for(1, 0, 132) == splits.splits_for(1, 1, 132) == 1
    assert splits.splits_for(10_000, 64, 132) == 1
    assert 120 < splits.splits_for(1, 1 << 20, 132) <= 132
    assert splits.splits_for(1, 1 << 20, 1000) <= splits.MAX_SPLITS


def test_the_tile_is_the_smallest_that_holds_the_rows():
    for head_dim in (64, 128, 256):
        for rows in (1, 16, 17, 32, 33, 64, 200):
            tile = splits.decode_tile(head_dim, rows, interpreted=False)
            assert tile.block_m == {1: 16, 16: 16, 17: 32, 32: 32, 33: 64, 64: 64, 200: 64}[rows] and tile.block_n >= 32


def test_auto_gives_few_query_rows_and_many_bytes_to_the_decode_kernel():
    def pays(batch, seqlen_q, heads, seqlen_k, kv_heads):
        shapes = (batch, seqlen_q, heads, 128), (batch, seqlen_k, kv_heads, 128)
        return few_queries.pays(*(torch.empty(shape, dtype=BRAIN, device="meta") for shape in shapes))

    assert pays(1, 1, 32, 4096, 8) and pays(64, 1, 32, 131072, 8) and pays(8, 16, 32, 4096, 8)
    assert not pays(8, 17, 32, 4096, 8)  # 68 rows for a K/V head
    assert not pays(1, 1, 32, 256, 8)  # 1 MiB
    assert not pays(1, 0, 32, 4096, 8) and not pays(1, 1, 0, 4096, 0)
    assert ops._resolve("auto", torch.empty(1, 1, 1, 64), False) == ops.FASTEST_ANYWHERE  # the CPU keeps its kernel


COMPILE = """
import json, pathlib, re, subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fasim.kernels.decode import kernel as decode, splits

binaries = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
for head_dim, rows in ((64, 64), (128, 16), (256, 16)):
    tile = splits.decode_tile(head_dim, rows, False)
    fixed = dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, HEAD_DIM=head_dim, CAUSAL=True, TMA=False, PARTIAL=True, EARLY=True)
    names = decode._walk_part.arg_names
    fixed |= {name: 1 for name in names if name.endswith("stride_d")}
    types = {**dict.fromkeys("qkv", "*bf16"), "o": "*fp32", "lse": "*fp32", "scale_log2": "fp32"}
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
    whole = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names)
             if name not in fixed and (signature[name][0] == "*" or "stride" in name)}
    built = triton.compile(ASTSource(decode._walk_part, signature, fixed, whole), GPUTarget("cuda", 90, 32), tile.options())
    cubin = pathlib.Path(sys.argv[1]) / f"{head_dim}.cubin"
    cubin.write_bytes(built.asm["cubin"])
    said = subprocess.run([binaries / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\\d+) STACK:(\\d+).*LOCAL:(\\d+)", said).groups())
    print(json.dumps([head_dim, rows, registers, stack + local, built.metadata.shared]))
"""


def test_it_compiles_for_hopper_without_spills_in_the_order_of_its_schedule_and_fits_an_sm(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 3
    for head_dim, rows, registers, spilled, shared in found:
        tile = splits.decode_tile(head_dim, rows, interpreted=False)
        assert spilled == 0
        assert shared <= 227 << 10 and registers * 32 * tile.num_warps <= 65536
        (code,) = disassemble.kernels_of(tmp_path / f"{head_dim}.cubin")
        workload = Workload(1, rows, kv_heads=1, seqlen_q=1, seqlen_k=8192, head_dim=head_dim, dtype="bf16")
        block = Tile(rows, tile.block_n, tile.num_stages, 1, parts=2)
        assert static.differs_in_copies(code, "decode", workload, block) == ""
        fewer = replace(block, stages=tile.num_stages - 1)
        assert "where decode says copies but" in static.differs_in_copies(code, "decode", workload, fewer)
