"""The Triton forward launched past Triton: bounded.py against fp64 in the interpreter, and what the compiler makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import gluon_ptx as ptx
import pytest
import triton_env as env  # first: it chooses the interpreter

torch = pytest.importorskip("torch")

from triton.runtime import interpreter  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from fasim.kernels import ops, reference  # noqa: E402
from fasim.kernels.launch import bounded, fa2  # noqa: E402
from fasim.kernels.measure import tiles_triton  # noqa: E402
from fasim.simulator.problem.workload import Workload  # noqa: E402

BLOCK = 16


def described(x):
    """(B, S, H, D) as [B, H, S, D], in boxes of BLOCK rows."""
    batch, seqlen, heads, head_dim = x.shape
    strides = [x.stride(0), x.stride(2), x.stride(1), 1]
    return TensorDescriptor(x, [batch, heads, seqlen, head_dim], strides, [1, 1, BLOCK, head_dim])


@pytest.fixture
def in_numpy(monkeypatch):
    """Inline assembly on numpy: the interpreter has none."""

    def create_inline_asm(self, text, constraints, given, kinds, is_pure, pack):
        made = ptx.run(text, constraints, [each.data for each in given], pack)
        handles = [interpreter.TensorHandle(values, kind.scalar) for values, kind in zip(made, kinds, strict=True)]
        return SimpleNamespace(get_result=handles.__getitem__)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create_inline_asm, raising=False)


@pytest.mark.skipif(env.DEVICE == "cuda", reason="tiles of 16 rows are the interpreter's")
@pytest.mark.parametrize("overlapped", [False, True], ids=["in-turn", "overlapped"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "seqlen_q", "seqlen_k", "causal"),
    [(2, 1, 33, 40, True), (1, 1, 40, 33, True), (1, 1, 1, 50, False), (1, 1, 32, 48, False)],
)
@pytest.mark.parametrize("one_walk", [False, True], ids=["two-walks", "one-walk"])
def test_it_gives_attention(heads, kv_heads, seqlen_q, seqlen_k, causal, overlapped, one_walk, in_numpy):
    q, k, v, o = env.inputs(1, heads, kv_heads, seqlen_q, seqlen_k, 64)
    lse = torch.full((1, heads, seqlen_q), float("nan"))
    bounded.attention_forward[(-(-seqlen_q // BLOCK) * heads,)](
        described(q), described(k), described(v), described(o), lse, 64**-0.5 * fa2.LOG2_E, heads, heads, heads // kv_heads,
        seqlen_q, seqlen_k, BLOCK_M=BLOCK, BLOCK_N=BLOCK, HEAD_DIM=64, CAUSAL=causal, WHOLE=not causal and seqlen_k % BLOCK == 0,
        OVERLAPPED=overlapped, ONE_WALK=one_walk, TOGETHER=2,
    )  # fmt: skip
    right = reference.attention_forward(q, k, v, causal=causal)
    assert env.relative_error(o, right.o) < 5e-4
    assert torch.allclose(lse.double(), right.lse, atol=1e-5)


COMPILE = """
import json, re
from fasim.kernels.launch import fa2
from fasim.kernels.measure import tiles_triton
from fasim.kernels.triton.tiles import TritonTile
found = {}
for head_dim, name in ((128, "64x64, 4 warps, 3 stages, overlapped"),
                       (128, "64x64, 4 warps, 3 stages, overlapped, bounded, one walk"), (64, "128x128, 4 warps, 3 stages")):
    shape = (16, 1024, 2048 // head_dim, head_dim)
    tile = TritonTile(*map(int, re.match(r"(\\d+)x(\\d+), (\\d+) warps, (\\d+)", name).groups()), overlapped="overlapped" in name)
    config = fa2.config_of(shape, shape, "bf16", head_dim == 128, tile, "bounded" in name, "one walk" in name)
    built = fa2.build(config)
    kinds = [kind for _, kind in built.signature]
    found[f"d{head_dim} {name}"] = [tiles_triton.flaws(config), built.smem_bytes, built.threads, kinds]
print(json.dumps(found))
"""


def test_its_kernels_are_compiled_and_their_flaws_seen():
    """Two programs of 64x64 share an SM; the table's tile at head_dim 64 has its GEMMs serialised by the assembler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    two, one, narrow = json.loads(done.stdout).values()
    assert two[0] == one[0] == "" and narrow[0] == "GEMMs serialised"
    assert two[2] == one[2] == 128 and max(two[1], one[1]) + 1024 <= 228 * 1024 // 2
    assert sum(kind.startswith("tensordesc") for kind in two[3]) == 3 and sum(kind.startswith("tensordesc") for kind in one[3]) == 4


def test_each_length_has_its_tile_and_nothing_is_launched_so_unless_asked():
    forms = {name: [fa2.config_for(shape, shape, "bf16", causal).name for shape in ((2, 1024, 16, 128), (2, 4096, 16, 128))]
             for name, causal in (("full", False), ("causal", True))}  # fmt: skip
    assert forms["full"] == ["64x64, 4 warps, 3 stages, overlapped, bounded"] * 2
    assert forms["causal"] == ["128x64, 4 warps, 2 stages, bounded, one walk", forms["full"][0] + ", one walk"]
    assert ops.PLANNED_FA2 is False
    names = tiles_triton.candidates(Workload(1, 16, 16384, 128, "bf16", False))
    bounded_forms = [name for name in names if "bounded" in name]
    assert len(names) == 3 * len(tiles_triton.TILES[128]) and 3 * len(bounded_forms) == 2 * len(names)
    assert 2 * sum("one walk" in name for name in bounded_forms) == len(bounded_forms)
    long = tiles_triton.candidates(Workload(1, 16, 16384, 128, "bf16", True))
    fewer = {name: config.together for name, config in long.items() if "together" in name}
    assert all(f", {heads} heads" in name for name, heads in fewer.items()) and {1, 2} == {*fewer.values()}
    assert fa2.config_for((1, 16384, 16, 128), (1, 16384, 16, 128), "bf16", True).together == 4
