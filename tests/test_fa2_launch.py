"""The Triton forward launched past Triton: its one walk against fp64 in the interpreter, and what the compiler makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import triton_env as env  # first: it chooses the interpreter

torch = pytest.importorskip("torch")

from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from fasim.kernels import ops, reference  # noqa: E402
from fasim.kernels.launch import fa2, one_walk  # noqa: E402
from fasim.kernels.measure import tiles_triton  # noqa: E402
from fasim.simulator.problem.workload import Workload  # noqa: E402

BLOCK = 16


def described(x):
    """(B, S, H, D) as [B, H, S, D], in boxes of BLOCK rows."""
    batch, seqlen, heads, head_dim = x.shape
    strides = [x.stride(0), x.stride(2), x.stride(1), 1]
    return TensorDescriptor(x, [batch, heads, seqlen, head_dim], strides, [1, 1, BLOCK, head_dim])


@pytest.mark.skipif(env.DEVICE == "cuda", reason="tiles of 16 rows are the interpreter's")
@pytest.mark.parametrize("overlapped", [False, True], ids=["in-turn", "overlapped"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "seqlen_q", "seqlen_k", "causal"),
    [(2, 1, 33, 40, True), (1, 1, 40, 33, True), (1, 1, 1, 50, False), (1, 1, 32, 48, False)],
)
def test_one_walk_gives_attention(heads, kv_heads, seqlen_q, seqlen_k, causal, overlapped):
    q, k, v, o = env.inputs(1, heads, kv_heads, seqlen_q, seqlen_k, 64)
    lse = torch.full((1, heads, seqlen_q), float("nan"))
    one_walk.attention_forward[(-(-seqlen_q // BLOCK) * heads,)](
        described(q), described(k), described(v), described(o), lse, 64**-0.5 * fa2.LOG2_E, heads, heads, heads // kv_heads,
        seqlen_q, seqlen_k, BLOCK_M=BLOCK, BLOCK_N=BLOCK, HEAD_DIM=64, CAUSAL=causal, WHOLE=not causal and seqlen_k % BLOCK == 0,
        OVERLAPPED=overlapped, TOGETHER=2,
    )  # fmt: skip
    right = reference.attention_forward(q, k, v, causal=causal)
    assert env.relative_error(o, right.o) < 5e-4
    assert torch.allclose(lse.double(), right.lse, atol=1e-5)


COMPILE = """
import json
from fasim.kernels.launch import fa2
from fasim.kernels.launch.arguments import ArgumentBlock
from fasim.kernels.measure import tiles_triton
from fasim.simulator.problem.workload import Workload
found = {}
for head_dim, name in ((128, "64x64, 4 warps, 3 stages, overlapped"), (128, "64x64, 4 warps, 3 stages, overlapped, one walk"),
                       (64, "128x128, 4 warps, 3 stages")):
    config = tiles_triton.candidates(Workload(16, 2048 // head_dim, 1024, head_dim, "bf16", head_dim == 128))[name]
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
    short, long = ((2, seqlen, 16, 128) for seqlen in (1024, 4096))
    assert fa2.config_for(short, short, "bf16", False).tile == fa2.SHORT != fa2.config_for(long, long, "bf16", False).tile
    assert ops.PLANNED_FA2 is False
    names = tiles_triton.candidates(Workload(1, 16, 16384, 128, "bf16", False))
    assert len(names) == 2 * len(tiles_triton.TILES[128]) and sum("one walk" in name for name in names) == len(names) // 2
