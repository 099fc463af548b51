"""A cache of K and V in pages: whatever their size and order, O and LSE are the oracle's of each entry's own keys."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("triton_env", Path(__file__).with_name("triton_env.py"))
env = sys.modules.setdefault("triton_env", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(env)

import torch  # noqa: E402

from fasim.kernels import reference  # noqa: E402
from fasim.kernels.compile import disassemble  # noqa: E402
from fasim.kernels.decode import cache, splits  # noqa: E402
from fasim.kernels.ops import flash_attn_with_kvcache  # noqa: E402
from fasim.simulator.errors import UsageError  # noqa: E402
from fasim.simulator.problem.tile import Tile  # noqa: E402
from fasim.simulator.problem.workload import Workload  # noqa: E402
from fasim.traces import static  # noqa: E402

HALF, BRAIN = torch.float16, torch.bfloat16
# heads, kv_heads, seqlen_q, lengths, page_size, head_dim, causal, dtype, num_splits
CASES = [
    (8, 2, 1, (37, 0, 1), 16, 64, False, HALF, 2),  # pages of a block; no keys, one key
    (4, 1, 3, (37, 50), 32, 64, True, BRAIN, 3),
    (4, 2, 2, (21, 33), 1, 64, True, HALF, 2),  # pages of one key
    (4, 4, 1, (29, 5), 12, 64, False, HALF, 4),  # pages that cut blocks
    (2, 1, 4, (3, 40), 16, 64, True, HALF, 1),  # rows without keys
    (2, 1, 1, (40,), 16, 128, False, BRAIN, None),
]


def paged(q, k, v, lengths, page_size, seed=0):
    """Caches whose pages hold these keys in shuffled order, the rest of them NaN; and the table, -7 where there is no page."""
    pages = [-(-n // page_size) for n in lengths]
    places = torch.randperm(sum(pages) + 3, generator=torch.Generator().manual_seed(seed)).tolist()
    table = torch.full((len(lengths), max(1, *pages)), -7, dtype=torch.int32)
    caches = [torch.full((len(places), page_size, *x.shape[2:]), math.nan, dtype=x.dtype, device=x.device) for x in (k, v)]
    for entry, length in enumerate(lengths):
        for i in range(pages[entry]):
            table[entry, i] = page = places.pop()
            rows = slice(i * page_size, min(length, (i + 1) * page_size))
            for whole, x in zip(caches, (k, v), strict=True):
                whole[page, : rows.stop - rows.start] = x[entry, rows]
    return *caches, torch.tensor(lengths, dtype=torch.int32, device=q.device), table.to(q.device)


def check(o, lse, q, k, v, lengths, scale, causal):
    assert o.dtype == q.dtype and o.shape == q.shape
    for entry, length in enumerate(lengths):
        one = slice(entry, entry + 1)
        expected = reference.attention_forward(q[one], k[one, :length], v[one, :length], scale, causal)
        assert env.relative_error(o[one], expected.o) < (1e-3 if q.dtype == HALF else 8e-3)
        dead = expected.lse == -math.inf
        assert torch.equal(lse[one] == -math.inf, dead) and (o[one].transpose(1, 2)[dead] == 0).all()
        torch.testing.assert_close(lse[one][~dead].double(), expected.lse[~dead], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pages_in_any_order_equal_the_oracle(case):
    heads, kv_heads, seqlen_q, lengths, page_size, head_dim, causal, dtype, count = case
    q, k, v, _ = env.inputs(len(lengths), heads, kv_heads, seqlen_q, max(lengths), head_dim, dtype)
    *caches, seqlens, table = paged(q, k, v, lengths, page_size)
    out = flash_attn_with_kvcache(q, *caches, seqlens, table, 0.11, causal, num_splits=count, return_lse=True)
    check(*out, q, k, v, lengths, 0.11, causal)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_caches_without_pages_of_any_strides_and_entries_of_another_order(scale):
    lengths, order = (20, 33), torch.tensor([2, 0], dtype=torch.int32, device=env.DEVICE)
    q, k, v, _ = env.inputs(2, 4, 2, 2, 33, 64)
    caches = [torch.full((3, 33, 2, 64), math.nan, dtype=HALF, device=env.DEVICE).transpose(1, 2).contiguous().transpose(1, 2)] * 2
    caches = [x.clone() for x in caches]
    for whole, x in zip(caches, (k, v), strict=True):
        for entry, length in enumerate(lengths):
            whole[order[entry], :length] = x[entry, :length]
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=env.DEVICE)
    out = flash_attn_with_kvcache(q, *caches, seqlens, None, scale, True, cache_batch_idx=order, return_lse=True, num_splits=2)
    check(*out, q, k, v, lengths, scale, True)
    check(*flash_attn_with_kvcache(q, k, v, 33, causal=True, return_lse=True), q, k, v, (33, 33), None, True)


def test_entries_may_take_any_rows_of_the_table():
    q, k, v, _ = env.inputs(2, 4, 2, 1, 40, 64)
    *caches, seqlens, table = paged(q, k, v, (40, 21), 16)
    rows = torch.tensor([1, 0], dtype=torch.int32, device=env.DEVICE)
    out = flash_attn_with_kvcache(q, *caches, seqlens.flip(0), table, causal=True, return_lse=True, cache_batch_idx=rows)
    check(*out, q, k.flip(0), v.flip(0), (21, 40), None, True)


def test_opcheck_and_torch_compile():
    q, k, v, _ = env.inputs(1, 4, 2, 1, 20, 64)
    *caches, seqlens, table = paged(q, k, v, (20,), 16)
    torch.library.opcheck(cache.attention_with_cache, (q, *caches, seqlens, table, 0.125, False, 2))
    assert flash_attn_with_kvcache(q[:0], *caches, seqlens[:0], table[:0]).shape == (0, 1, 4, 64)
    assert (flash_attn_with_kvcache(q, *caches, 0, table[:, :0]) == 0).all()


def refused(**given):
    q = torch.zeros(2, 1, 2, 64, dtype=HALF, device=env.DEVICE)
    pages = torch.zeros(5, 16, 2, 64, dtype=HALF, device=env.DEVICE)
    table = torch.tensor([[0, 4], [3, 2]], dtype=torch.int32, device=env.DEVICE)
    about = {"q": q, "k_cache": pages, "v_cache": pages, "cache_seqlens": LENGTHS, "page_table": table}
    return flash_attn_with_kvcache(**(about | given))


LENGTHS = torch.tensor([32, 7], dtype=torch.int32)
TABLE = torch.tensor([[0, 5], [3, 2]], dtype=torch.int32)
REFUSED = {
    "page_table has page 5 for entry 0; the cache has pages 0 to 4": {"page_table": TABLE},
    "page_table has page -1 for entry 0": {"page_table": TABLE - 1},
    "page_table is (2, 2), torch.int64; it must be torch.int32 of (2, any)": {"page_table": TABLE.long()},
    "page_table is (1, 2), torch.int32": {"page_table": TABLE[:1]},
    "cache_seqlens go from 7 to 33; an entry's pages hold 0 to 32 keys": {"cache_seqlens": LENGTHS + torch.tensor([1, 0]).int()},
    "cache_seqlens=33 is not possible: there is room for 32 keys": {"cache_seqlens": 33},
    "cache_seqlens is a bool": {"cache_seqlens": True},
    "page_table and block_table are one thing": {"block_table": TABLE},
    "cache_batch_idx [0, 5] are not all rows of a page_table of 2": {"cache_batch_idx": TABLE[0]},
    "q is of 2 entries and the cache of 5": {"page_table": None},
    "k_cache is (2, 64)": {"k_cache": torch.zeros(2, 64)},
    "num_splits=257 is not possible": {"num_splits": 257},
    "3 heads do not divide": dict.fromkeys(("k_cache", "v_cache"), torch.zeros(5, 16, 3, 64, dtype=HALF)),
}


@pytest.mark.skipif(env.DEVICE == "cuda", reason="lengths and pages are looked at on the CPU alone")
@pytest.mark.parametrize("message", REFUSED)
def test_bad_tables_are_said_in_one_sentence(message):
    with pytest.raises(UsageError) as caught:
        refused(**REFUSED[message])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert refused().shape == (2, 1, 2, 64)


COMPILE = """
import json, pathlib, re, subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fasim.kernels.decode import kernel, paged, splits

binaries = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
tile = splits.decode_tile(128, 16, False)
paging = [(paged._walk_pages, {"PAGE": page}) for page in (64, 16)]
for number, (function, more) in enumerate(((kernel._walk_part, {"TMA": False}), *paging)):
    fixed = dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, HEAD_DIM=128, CAUSAL=False, PARTIAL=True, EARLY=True) | more
    names = function.arg_names
    fixed |= {name: 1 for name in names if name.endswith(("stride_d", "table_stride_p"))}
    types = {**dict.fromkeys("qkv", "*bf16"), **dict.fromkeys(("o", "lse"), "*fp32"), **dict.fromkeys(("lengths", "table"), "*i32")}
    signature = {name: "constexpr" if name in fixed else (types | {"scale_log2": "fp32"}).get(name, "i32") for name in names}
    whole = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names)
             if name not in fixed and (signature[name][0] == "*" or "stride" in name)}
    built = triton.compile(ASTSource(function, signature, fixed, whole), GPUTarget("cuda", 90, 32), tile.options())
    cubin = pathlib.Path(sys.argv[1]) / f"{number}.cubin"
    cubin.write_bytes(built.asm["cubin"])
    said = subprocess.run([binaries / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True).stdout
    _, stack, local = map(int, re.search(r"REG:(\\d+) STACK:(\\d+).*LOCAL:(\\d+)", said).groups())
    copies = len(re.findall("cp.async.cg", built.asm["ptx"]))
    print(json.dumps([stack + local, built.metadata.shared, copies, re.findall(r"cp.async.wait_group (\\d+)", built.asm["ptx"])]))
"""


def test_looking_pages_up_leaves_as_many_bytes_on_their_way_and_spills_nothing(tmp_path):
    """The next block's page is looked up a block ahead: looked up where it is needed, Triton keeps one block on its way."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    unpaged, *with_pages = [json.loads(line) for line in done.stdout.splitlines()]
    workload = Workload(1, 16, kv_heads=1, seqlen_q=1, seqlen_k=8192, dtype="bf16")
    for number in range(3):
        (code,) = disassemble.kernels_of(tmp_path / f"{number}.cubin")
        assert static.differs_in_copies(code, "decode", workload, Tile(16, 64, 4, 1, parts=2)) == ""
    block_bytes = splits.decode_tile(128, 16, False).block_n * 256
    assert unpaged[0] == 0 and unpaged[1] >= 3 * 2 * block_bytes and with_pages == [unpaged] * 2
