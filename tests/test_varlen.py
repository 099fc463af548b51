"""Packed sequences: each has the oracle's O, LSE and gradients, whatever lies beside it."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("triton_env", Path(__file__).with_name("triton_env.py"))
env = sys.modules.setdefault("triton_env", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(env)

import torch  # noqa: E402

from fasim.kernels.compile import build, disassemble  # noqa: E402
from fasim.kernels.cuda import config as fixed  # noqa: E402
from fasim.kernels.cuda.varlen import config  # noqa: E402
from fasim.kernels.ops import flash_attn_varlen_func  # noqa: E402
from fasim.kernels.varlen import operator, reference  # noqa: E402
from fasim.simulator.errors import UsageError  # noqa: E402
from fasim.simulator.problem.workload import Workload  # noqa: E402
from fasim.traces import static  # noqa: E402

HALF, BRAIN = torch.float16, torch.bfloat16
# lengths of queries and of keys, heads, kv_heads, head_dim, causal, dtype, rows before the first sequence and after the last
CASES = [
    ((20, 1, 0, 37), (20, 1, 0, 37), 2, 2, 64, True, HALF, (0, 0)),
    ((5, 33), (40, 17), 4, 2, 64, False, BRAIN, (3, 4)),
    ((18, 0, 7), (0, 9, 30), 4, 1, 64, True, HALF, (0, 2)),  # queries without keys, keys without queries
    ((16, 16), (16, 16), 2, 1, 128, True, BRAIN, (0, 0)),
    ((), (), 2, 2, 64, False, HALF, (2, 0)),
    ((40,), (3,), 1, 1, 256, True, HALF, (0, 0)),  # rows that see no key
]


def name_of(case):
    queries, keys = ("+".join(map(str, lengths)) for lengths in case[:2])
    return f"{queries}/{keys}-{case[2]}-{case[3]}-d{case[4]}-{'causal' if case[5] else 'full'}"


def packed(case, seed=0):
    """q, k, v, do, dlse and both cu_seqlens of a case."""
    lengths_q, lengths_k, heads, kv_heads, head_dim, _, dtype, (before, after) = case
    random = torch.Generator().manual_seed(seed)
    cu = [torch.tensor([*accumulate(lengths, initial=before)], dtype=torch.int32) for lengths in (lengths_q, lengths_k)]
    totals = [before + sum(lengths) + after for lengths in (lengths_q, lengths_k)]

    def normal(*shape):
        return torch.randn(*shape, generator=random).to(dtype).to(env.DEVICE)

    q, do = (normal(totals[0], heads, head_dim) for _ in range(2))
    k, v = (normal(totals[1], kv_heads, head_dim) for _ in range(2))
    dlse = torch.randn(heads, totals[0], generator=random).to(env.DEVICE)
    return q, k, v, do, dlse, *(x.to(env.DEVICE) for x in cu)


def longest(cu):
    return int(cu.diff().max()) if len(cu) > 1 else 0


def run(q, k, v, cu_q, cu_k, **given):
    return flash_attn_varlen_func(q, k, v, cu_q, cu_k, longest(cu_q), longest(cu_k), **given)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_sequence_has_the_oracles_output_and_gradients(case):
    q, k, v, do, dlse, cu_q, cu_k = packed(case)
    causal, tolerance = case[5], 1e-3 if case[6] == HALF else 8e-3
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o, lse = run(*leaves, cu_q, cu_k, softmax_scale=0.11, causal=causal, return_lse=True)
    expected = reference.attention_forward(q, k, v, cu_q, cu_k, 0.11, causal)
    assert env.relative_error(o, expected.o) < tolerance
    dead = expected.lse == -math.inf
    assert torch.equal(lse == -math.inf, dead) and (o.transpose(0, 1)[dead] == 0).all()
    torch.testing.assert_close(lse[~dead].double(), expected.lse[~dead], rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad((o, lse), leaves, (do, torch.where(dead, 0.0, dlse)))
    wanted = reference.attention_backward(q, k, v, do, cu_q, cu_k, 0.11, causal, torch.where(dead, 0.0, dlse))
    for ours, theirs in zip(got, wanted, strict=True):
        assert env.relative_error(ours, theirs) < 3 * tolerance


def test_what_is_not_finite_stays_in_its_sequence():
    case = ((20, 30, 10), (20, 30, 10), 2, 1, 64, False, HALF, (4, 4))
    q, k, v, _, _, cu_q, cu_k = packed(case)
    for x in (k, v):
        x[:4], x[24:54], x[64:] = math.nan, math.inf, math.nan
    o, lse = run(q, k, v, cu_q, cu_k, return_lse=True)
    alone = reference.attention_forward(q, k, v, cu_q, cu_k)
    for rows in (slice(4, 24), slice(54, 64)):
        assert env.relative_error(o[rows], alone.o[rows]) < 1e-3 and lse[:, rows].isfinite().all()


@pytest.mark.parametrize("scale", [None, 0.0, -0.3])
def test_any_scale_and_any_strides(scale):
    q, k, v, _, _, cu_q, cu_k = packed(((9, 25), (30, 5), 4, 2, 64, True, HALF, (0, 0)))
    expected = reference.attention_forward(q, k, v, cu_q, cu_k, scale, True)
    by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    by_column = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k, v)]
    off = [torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in (q, k, v)]
    for tensors in ((q, k, v), by_head, by_column, off):
        assert env.relative_error(run(*tensors, cu_q, cu_k, softmax_scale=scale, causal=True), expected.o) < 1e-3


def test_opcheck_and_torch_compile():
    q, k, v, _, _, cu_q, cu_k = packed(((9, 20), (9, 20), 2, 2, 64, True, HALF, (0, 0)))
    arguments = q.clone().requires_grad_(), k, v, cu_q, cu_k, 20, 20, 0.125, True
    torch.library.opcheck(operator.attention_varlen, arguments)

    def model(q, k, v, cu_q, cu_k):
        return flash_attn_varlen_func(q * 2, k, v, cu_q, cu_k, 20, 20, causal=True) + 1

    backend = "inductor" if env.DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend)(q, k, v, cu_q, cu_k)
    torch.testing.assert_close(compiled, model(q, k, v, cu_q, cu_k), rtol=2e-3, atol=2e-3)


ROWS = torch.zeros(10, 2, 64, dtype=HALF)
CU = torch.tensor([0, 4, 10], dtype=torch.int32)
REFUSED = {
    "q has shape (1, 10, 2, 64); packed sequences are (total, heads, head_dim)": ((ROWS[None], ROWS, ROWS, CU, CU, 6, 6), {}),
    "cu_seqlens_q is (3,), torch.int64; it must be torch.int32": ((ROWS, ROWS, ROWS, CU.long(), CU, 6, 6), {}),
    "cu_seqlens_k is a list": ((ROWS, ROWS, ROWS, CU, [0, 10], 6, 6), {}),
    "cu_seqlens_q is of 2 sequences and cu_seqlens_k of 1": ((ROWS, ROWS, ROWS, CU, CU[:2], 6, 6), {}),
    "cu_seqlens_k must rise from 0 to at most the 10 rows there are": ((ROWS, ROWS, ROWS, CU, CU.flip(0), 6, 6), {}),
    "max_seqlen_q=5 is less than the longest sequence, 6": ((ROWS, ROWS, ROWS, CU, CU, 5, 6), {}),
    "max_seqlen_k=1.5 is not possible": ((ROWS, ROWS, ROWS, CU, CU, 6, 1.5), {}),
    "schedule='fa1' has no kernel of packed sequences (auto, fa2, fa3)": ((ROWS, ROWS, ROWS, CU, CU, 6, 6), {"schedule": "fa1"}),
    "head_dim=32 is not supported by 'varlen'": ((*(ROWS[..., :32],) * 3, CU, CU, 6, 6), {}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_packed_sequences_cannot_be_is_said_in_one_sentence(message):
    arguments, given = REFUSED[message]
    on_device = [x.to(env.DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments]
    if env.DEVICE == "cuda" and ("rise" in message or "less than" in message):
        pytest.skip("lengths on a GPU are not read")
    with pytest.raises(UsageError) as caught:
        flash_attn_varlen_func(*on_device, **given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(build.compiler_version() is None, reason="NVRTC is not installed")
@pytest.mark.parametrize("variant", config.variants()[1::5], ids=lambda variant: variant.name.replace(" ", "-"))
def test_the_kernel_compiles_without_spills_in_the_order_of_its_schedule(variant):
    report = build.build(variant.source).report
    assert (report.spill_bytes, report.stack_bytes, report.remarks) == (0, 0, ())
    (kernel,) = disassemble.of_cubin(build.build(variant.source).cubin)
    workload = Workload(1, 1, 8448, variant.head_dim, variant.dtype, variant.causal)
    assert static.differs(kernel, variant.schedule, workload, variant.tile) == ""


@pytest.mark.skipif(build.compiler_version() is None, reason="NVRTC is not installed")
def test_the_kernel_that_prepares_replaces_an_address_and_a_length_in_each_map():
    assert build.build(config.prepare()).report.spill_bytes == 0
    text = config.prepare().text
    assert len(re.findall(r"tensormap\.replace\.tile\.(global_address|global_dim)", text)) == 2


def test_an_edit_that_has_lost_its_place_is_an_error():
    with pytest.raises(ValueError, match=r"attention.cuh has 0 places for 'const TensorMap &q, &k, &v, &o;', not one"):
        config.edited(fixed.headers()["attention.cuh"].replace("const TensorMap &q", "const  TensorMap &q"))


def test_the_launch_calls_what_is_there():
    """It runs on a GPU alone: nothing else here would notice that a name is gone."""
    from fasim.kernels.cuda import driver, launch

    tree = ast.parse((config.HERE / "launch.py").read_text(encoding="utf-8"))
    rooms = {"launch": launch, "driver": driver, "build": build, "torch": torch}
    used = {
        (each.value.id, each.attr)
        for each in ast.walk(tree)
        if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id in rooms
    }
    assert ("launch", "Operand") in used
    assert [f"{room}.{name}" for room, name in sorted(used) if not hasattr(rooms[room], name)] == []


BATCHES_DIFFER = {"tiles", "total_q", "total_k", "padded", "lse_stride_h", "dlse_stride_h"}


def test_a_batch_of_other_lengths_compiles_no_triton_kernel_anew():
    script = (
        "import json; from fasim.kernels.varlen import backward, forward\n"
        "kernels = backward._prepare, backward._keys_and_values, backward._queries, forward._forward\n"
        "print(json.dumps([{p.name: p.do_not_specialize for p in kernel.params} for kernel in kernels]))"
    )
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", script], env=plain, capture_output=True, text=True, check=True)
    for general in json.loads(ran.stdout):
        assert all(general[name] for name in general.keys() & BATCHES_DIFFER)
        assert not general["heads" if "heads" in general else "kv_heads"]  # of a model, and the same in every batch
