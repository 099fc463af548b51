"""The group that asks what a call does to the process it runs in, and whether a CUDA graph can hold it.

A changed setting that decides what other code computes, or where, is a failure; what else changes is a note. A kernel that a
CUDA graph cannot capture is a note; one whose replay is wrong is a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from . import calls, criteria, state, yardstick
from .check import Case, Fault, Noted, Skipped, Trial, explained
from .differentiate import backward

if TYPE_CHECKING:
    from .bench import Bench

_WARM_UP = 3


def trials(bench: Bench) -> Iterator[Trial]:
    """What a call changes, under default settings and others; other default dtypes; CUDA graphs."""
    sizes = {"seqlen_q": bench.tile + 3, "seqlen_k": 2 * bench.tile - 1, "head_dim": bench.head_dims[0]}
    case = Case(name="process", causal=True, batch=2, heads=4, kv_heads=2, **sizes)
    for name, settings in (("as they are", _as_they_are), ("unusual ones", _unusual)):
        yield Trial(f"settings stay: {name}", lambda settings=settings: _forward_leaves(bench, case, settings))
        yield Trial(f"settings stay, backward: {name}", lambda settings=settings: _backward_leaves(bench, case, settings))
    for dtype in (torch.float64, torch.bfloat16):
        word = str(dtype).removeprefix("torch.")
        yield Trial(f"{word} as the default dtype", lambda dtype=dtype, word=word: _default_dtype(bench, case, dtype, word))
    yield Trial("CUDA graph, forward", lambda: _graph(bench, case, _forward_call))
    yield Trial("CUDA graph, forward and backward", lambda: _graph(bench, case, _backward_call))


# -- settings ---------------------------------------------------------------------------------------------------------


@contextmanager
def _as_they_are() -> Iterator[None]:
    yield


@contextmanager
def _unusual() -> Iterator[None]:
    """Each setting other than PyTorch's default, so that a kernel that resets one shows too."""
    before = state.read()
    try:
        state.set_determinism(1)
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.manual_seed(7)
        yield
    finally:
        state.put_back(before)


def _forward_leaves(bench: Bench, case: Case, settings: Callable) -> dict:
    tensors = bench.tensors(case)
    with settings():
        bench.call(*tensors, case)
    return _hold_settings(bench.changed, "a call", case)


def _backward_leaves(bench: Bench, case: Case, settings: Callable) -> dict:
    tensors, do = bench.tensors(case), bench.dout(case)
    with settings():
        backward(bench, case, *tensors, do)
    return _hold_settings(bench.changed, "backward", case)


def _hold_settings(changed: list[str], what: str, case: Case) -> dict:
    decisive = state.decisive(changed)
    if decisive:
        raise Fault(f"{what} changes {_listed(decisive)} for whatever runs after it; inputs: {case}")
    if changed:
        raise Noted(f"{what} changes {_listed(changed)}: no other result depends on it")
    return {}


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _default_dtype(bench: Bench, case: Case, dtype: torch.dtype, word: str) -> dict:
    tensors = bench.tensors(case)
    wanted = bench.yardstick(case, *tensors)
    before = torch.get_default_dtype()
    with explained(case, f"torch.set_default_dtype({word}), which is the caller's to choose, changes no result"):
        torch.set_default_dtype(dtype)
        try:
            got = bench.call(*tensors, case)
        finally:
            torch.set_default_dtype(before)
        return bench.compare(case, tensors, got, wanted)


# -- CUDA graphs ------------------------------------------------------------------------------------------------------


def _forward_call(bench: Bench, case: Case, tensors: list[torch.Tensor]) -> tuple:
    answer = bench.subject.forward(*tensors[:3], causal=case.causal, softmax_scale=case.softmax_scale)
    return (answer[0] if isinstance(answer, (tuple, list)) else answer,)


def _backward_call(bench: Bench, case: Case, tensors: list[torch.Tensor]) -> tuple:
    (out,) = _forward_call(bench, case, tensors)
    return out, *torch.autograd.grad(out, tensors[:3], tensors[3])


def _graph(bench: Bench, case: Case, work: Callable) -> dict:
    """Capture `work` once, put other numbers into its buffers, replay, and hold what the replay wrote."""
    if not bench.on_gpu:
        raise Skipped("needs a GPU: CUDA graphs")
    with_gradients = work is _backward_call
    if with_gradients and bench.no_backward(case):
        raise Skipped(bench.no_backward(case))
    rounds = [replace(case, name=f"{case.name} {turn}") for turn in range(2)]
    values = [[*bench.tensors(each), bench.dout(each, f"dO of {each.name}")] for each in rounds]
    buffers = [x.clone() for x in values[0]]
    if with_gradients:
        buffers = [x.requires_grad_() for x in buffers[:3]] + buffers[3:]
        backward(bench, case, *buffers)  # what it raises without a graph is not the graph's
    else:
        bench.call(*buffers[:3], case)
    captured = _capture(bench, case, work, buffers)
    for each, sources in zip(rounds, values, strict=True):
        with torch.no_grad():
            for buffer, source in zip(buffers, sources, strict=True):
                buffer.copy_(source)
        captured[0].replay()
        torch.cuda.synchronize()
        with explained(each, "a replayed CUDA graph computes with what its buffers hold now"):
            _hold_replay(bench, each, sources, captured[1])
    return {"replays": len(rounds)}


def _capture(bench: Bench, case: Case, work: Callable, buffers: list[torch.Tensor]) -> tuple:
    """The graph and the tensors it writes; raises Noted where it cannot be captured."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with calls.contained(), torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                work(bench, case, buffers)
        torch.cuda.current_stream().wait_stream(side)
        with calls.contained(), torch.cuda.graph(graph):
            found = work(bench, case, buffers)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        torch.cuda.synchronize()
        raise Noted(f"a CUDA graph cannot capture it: raised {calls.said(error)}") from None
    return graph, found


def _hold_replay(bench: Bench, case: Case, sources: list[torch.Tensor], found: tuple) -> None:
    q, k, v, do = sources
    exact, _, bound = bench.yardstick(case, q, k, v)
    criteria.hold("O", "bmhd", found[0].detach(), exact, bound)
    if len(found) > 1:
        exact, bounds = yardstick.gradients(q, k, v, do, case.causal, case.softmax_scale)
        for name, axes, got, wanted, bound in zip(
            ("dQ", "dK", "dV"), ("bmhd", "bnhd", "bnhd"), found[1:], exact, bounds, strict=True
        ):
            criteria.hold(name, axes, got, wanted, bound)
