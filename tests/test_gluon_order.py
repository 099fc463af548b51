"""The Gluon kernels' source, run on the CPU: right numbers in any order of events, and every planted fault is found."""

from __future__ import annotations

import zlib

import pytest

pytest.importorskip("torch")

import gluon_language as language
import numpy as np
from gluon_machine import TYPES, Error

from fasim.kernels.gluon import config as gluon

SHAPES = (
    # batch, heads, K/V heads, queries, keys, causal
    (1, 2, 2, 256, 256, False),  # whole tiles
    (2, 2, 1, 128, 512, True),  # more keys than queries; GQA
    (1, 3, 1, 257, 190, True),  # more queries than keys: rows that see none
    (1, 1, 1, 1, 300, False),
    (1, 2, 2, 449, 449, True),
    (1, 1, 1, 70, 1, False),
)
PLAIN = [rung for rung in gluon.SCHEDULES if rung not in gluon.QUEUED]
RUNGS = [
    *(gluon.config_for(rung, "bf16", head_dim, True) for rung in PLAIN for head_dim in (64, 128, 256)),
    *(config for head_dim in (64, 128, 256) for config in gluon.candidates("fp16", head_dim, True).values()),
]


def told(config: gluon.GluonConfig) -> str:
    hands = "named" if config.named else "mbarriers"
    return f"{config.schedule}-d{config.head_dim}-{config.block_m}x{config.block_n}" + f"-{hands}" * (
        config.schedule in gluon.QUEUED
    )


def oracle(q, k, v, causal):
    """O and LSE in fp64."""
    k, v = (np.repeat(x.astype(float), q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q.astype(float) @ k.swapaxes(2, 3) / np.sqrt(q.shape[3])
    if causal:
        rows, columns = scores.shape[2:]
        scores = np.where(np.arange(columns) <= np.arange(rows)[:, None] + columns - rows, scores, -np.inf)
    top = np.nan_to_num(scores.max(3, keepdims=True), neginf=0)
    total = np.exp(scores - top).sum(3, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + top)[..., 0]
    return np.exp(scores - top) @ v / np.where(total == 0, 1, total), lse


def check(config: gluon.GluonConfig, shape: tuple, seed: int, changed: dict[str, str] | None = None, growth: float = 6) -> None:
    """The kernel against fp64, on programs that run beside each other in an order drawn by `seed`.

    The walk is from the last key; the first are `growth` times as large, so that maxima grow on the way.
    """
    batch, heads, kv_heads, seqlen_q, seqlen_k, causal = shape
    ragged = config.schedule not in gluon.QUEUED or causal or seqlen_k % config.block_n != 0
    config = gluon.replace(config, causal=causal, ragged=ragged)
    random, kind = np.random.default_rng(seed), TYPES[config.dtype]
    sizes = (heads, seqlen_q), (kv_heads, seqlen_k), (kv_heads, seqlen_k)
    q, k, v = (kind.rounded(random.standard_normal((batch, *size, config.head_dim), np.float32)) for size in sizes)
    k = kind.rounded(k * np.linspace(growth, 1, seqlen_k, dtype=np.float32)[:, None])
    with np.errstate(all="ignore"):
        o, lse = language.run(language.Source(gluon.HERE, changed), config, q, k, v, section=2, programs=3, seed=seed)
    right, right_lse = oracle(q, k, v, causal)
    assert np.linalg.norm(o - right) < 6e-3 * np.linalg.norm(right), "O is wrong"
    assert np.array_equal(np.isinf(lse), np.isinf(right_lse)), "LSE is wrong"
    assert np.allclose(lse, right_lse, atol=1e-5), "LSE is wrong"


@pytest.mark.parametrize("config", RUNGS, ids=told)
def test_its_source_gives_attention_in_any_order_of_events(config):
    for number, shape in enumerate(SHAPES):
        check(config, shape, zlib.crc32(told(config).encode()) + number)


FAULTS = {
    "K is freed before S is there": (
        "fa3", "fa3", "    scores = warpgroup_mma_wait(1, deps=[scores])\n    release(shared.k_free, n, problem)\n",
        "    release(shared.k_free, n, problem)\n    scores = warpgroup_mma_wait(1, deps=[scores])\n", "overwrites a tile",
    ),
    "V is freed before P V is there": (
        "overlap-2stage", "overlap_2stage",
        "    acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])\n    release(shared.v_free, n - 1, problem)\n",
        "    release(shared.v_free, n - 1, problem)\n    acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])\n",
        "overwrites a tile",
    ),
    "a block is awaited in the other phase": (
        "pingpong", "attention", "mbarrier.wait(full.index(stage), (n // problem.STAGES) & 1)",
        "mbarrier.wait(full.index(stage), ((n // problem.STAGES) & 1) ^ 1)", "read before it is full",
    ),
    "a place is awaited in the other phase": (
        "warp-specialized", "attention", "((n // problem.STAGES) & 1) ^ 1)", "(n // problem.STAGES) & 1)", "nobody can go on",
    ),
    "one consumer frees for both": (
        "fa3", "attention", "barriers(STAGES, 1), barriers(STAGES, CONSUMERS), barriers(STAGES, 1)",
        "barriers(STAGES, 1), barriers(STAGES, 1), barriers(STAGES, 1)", "overwrites a tile|arrived at more often",
    ),
    "O is stored without a fence": ("fa3", "attention", "        fence_async_shared()\n", "", "no fence"),
    "the turn is not given": ("pingpong", "pingpong", "    give(shared, rank)\n    return", "    return", "nobody can go on"),
    "a product is used before it is there": (
        "fa3", "fa3", "scores = warpgroup_mma_wait(1, deps=[scores])", "scores = warpgroup_mma_wait(2, deps=[scores])",
        "before it is waited for",
    ),
    "a mask begins a row late": (
        "warp-specialized", "attention", "first_row + 1 + problem.seqlen_k", "first_row + 129 + problem.seqlen_k", "O is wrong",
    ),
    "a place is awaited that nobody took": ("persistent", "persistent", "n >= problem.STAGES:", "n >= 0:", "nobody can go on"),
    "O overwrites the O before": (
        "persistent", "persistent", "tma.store_wait(0)  # of the tile before, which left meanwhile", "pass",
        "that a store by TMA still reads",
    ),
    "Q is freed while S is multiplied": (
        "persistent", "persistent", "    state = pairs_of(weights",
        "    mbarrier.arrive(shared.q_free.index(rank), count=1)\n    state = pairs_of(weights",
        "overwrites a tile|arrived at more often|before it is full",
    ),
    "a number is posted again while it may be read": (
        "persistent", "persistent", "    if count > 1:\n        await_read(problem)\n",
        "    shared.work.index(0).store(gl.full([1], 0, gl.int32, None))\n    if count > 1:\n        await_read(problem)\n",
        "may still (read|write)",
    ),
    "what is posted may be read": (
        "persistent", "persistent", "    if count > 1:\n        await_read(problem)\n", "", "arrives twice",
    ),
    "a number is read before it is posted": (
        "bounded", "persistent", "    wait_at(POSTED + rank, WARPGROUP + WARP)\n", "", "may still|wrong|go on|often",
    ),
    "a turn is left over": ("persistent", "persistent", "rank == 0:\n        take(", "False:\n        take(", "is left with"),
    "halves of a pair change places": ("persistent", "assembly", '" $0, $2, $1;"', '" $0, $1, $2;"', "O is wrong"),
    "weights stand that passed the limit": ("bounded", "assembly", "0f44800000", "0f7f800000", "O is wrong"),
    "O keeps the scale of a smaller maximum": ("bounded", "bounded", "shrink_if_grown(acc, factor), top", "acc, top", "O is wrong"),
    "a maximum is one lane's": ("bounded", "assembly", "for lane in (1, 2)", "for lane in (1,)", "O is wrong"),
    "odd columns weigh as even ones": ("bounded", "assembly", "y, {odd[i]}, {scale[r]}", "y, {even[i]}, {scale[r]}", "O is wrong"),
    "the queue is not cleared": ("persistent", "persistent", "        gl.store(problem.queue, 0)\n", "", "the queue is left"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault):
    rung, file, text, instead, said = FAULTS[fault]
    source = (gluon.HERE / f"{file}.py").read_text(encoding="utf-8")
    assert source.count(text) >= 1
    config = gluon.config_for(rung, "bf16", 64, True)
    with pytest.raises((Error, AssertionError), match=said):
        for seed in range(20):
            keys = 120 if "posted again" in fault else 449  # with a block a tile nothing else keeps the producer back
            check(config, (1, 3, 1, 300, keys, True), seed, {file: source.replace(text, instead)}, growth=40)
