"""Kernels beside each other on one GPU: the protocol of every comparison of rates that is recorded here.

Every kernel of a case runs in bursts, in shuffled turns, on random normal data that rotates through buffers larger than L2;
time is the median over all calls by CUDA events, the SM clock and power are read by NVML in mid-burst. Peers: cuDNN and
FlashAttention-2 as PyTorch ships them, and FlexAttention, autotuned. Each output is first held to the fp64 oracle.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...simulator.problem.workload import Workload
from .. import ops, reference

SCHEMA = "fasim.kernel-times/1"
TOKENS = 16384
HIDDEN = 2048
"""Batch times length, and heads times head_dim, of every case: the papers' setting."""
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2-pytorch": SDPBackend.FLASH_ATTENTION}
BURST_S = 0.06
BUFFERS = 3
FLOPS_BACKWARD = 2.5
"""The backward counts five GEMMs to the forward's two (FlashAttention-2 section 4.1)."""


@dataclass(frozen=True)
class Case:
    """One row of the table: a pass of attention over a workload."""

    backward: bool
    workload: Workload

    @property
    def flops(self) -> float:
        """As the papers count them."""
        return self.workload.paper_flops * (FLOPS_BACKWARD if self.backward else 1)


Tensors = tuple[torch.Tensor, ...]
Call = Callable[[int], object]
"""Runs one kernel on buffer set number i."""


def buffers(case: Case) -> list[Tensors]:
    """q, k, v and dO, BUFFERS times over: several times L2 together."""
    w = case.workload
    generator = torch.Generator(device="cuda").manual_seed(w.seqlen + w.head_dim)
    shape = (w.batch, w.seqlen, w.heads, w.head_dim)
    return [
        tuple(torch.randn(shape, dtype=DTYPES[w.dtype], device="cuda", generator=generator) for _ in range(4))
        for _ in range(BUFFERS)
    ]


def attention_of(kernel: str, w: Workload) -> Callable[..., torch.Tensor]:
    """A function of (q, k, v) in our layout that returns O in our layout."""
    if kernel.startswith("fasim-"):
        schedule = kernel.removeprefix("fasim-")
        return lambda q, k, v: ops.flash_attn_func(q, k, v, causal=w.causal, schedule=schedule)
    if kernel == "flex":
        return _flex(w)

    def by_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(BACKENDS[kernel]):
            by_head = (x.transpose(1, 2) for x in (q, k, v))
            return functional.scaled_dot_product_attention(*by_head, is_causal=w.causal).transpose(1, 2)

    return by_sdpa


def _flex(w: Workload) -> Callable[..., torch.Tensor]:
    """FlexAttention compiled with its autotuner, for one shape."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    mask = None
    if w.causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, w.seqlen, w.seqlen, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs")

    def by_flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)

    return by_flex


def calls_of(kernel: str, case: Case, sets: list[Tensors]) -> Call:
    """The timed call; for the backward, forward graphs are kept and only the gradients are taken again."""
    attend = attention_of(kernel, case.workload)
    if not case.backward:
        return lambda i: attend(*sets[i][:3])
    graphs = []
    for *inputs, do in sets:
        leaves = [x.detach().requires_grad_() for x in inputs]
        graphs.append((attend(*leaves), leaves, do))

    def differentiate(i: int) -> Tensors:
        o, leaves, do = graphs[i]
        return torch.autograd.grad(o, leaves, do, retain_graph=True)

    return differentiate


def error_of(call: Call, case: Case, tensors: Tensors) -> float:
    """Largest relative error of any output against the oracle, over the first and the last head of the first entry."""
    outputs = call(0)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    worst = 0.0
    for head in (0, case.workload.heads - 1):
        q, k, v, do = (x[:1, :, head : head + 1] for x in tensors)
        if case.backward:
            expected = reference.attention_backward(q, k, v, do, causal=case.workload.causal)
        else:
            expected = reference.attention_forward(q, k, v, causal=case.workload.causal)[:1]
        for ours, theirs in zip(outputs, expected, strict=True):
            difference = ours[:1, :, head : head + 1].double() - theirs
            error = float(difference.norm() / theirs.norm())
            worst = max(worst, error) if math.isfinite(error) else math.inf
    return worst


class Meter:
    """Times bursts of calls and reads clock and power while the GPU is in the middle of one."""

    def __init__(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        self.nvml = pynvml
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid  # NVML counts those that CUDA hides, too
        self.handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

    def burst(self, call: Call, count: int) -> tuple[list[float], float, float]:
        """(milliseconds of each call, SM clock in MHz, board power in W)."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        marks[0].record()
        for i in range(count):
            call(i % BUFFERS)
            marks[i + 1].record()
        marks[count // 2].synchronize()
        clock = self.nvml.nvmlDeviceGetClockInfo(self.handle, self.nvml.NVML_CLOCK_SM)
        power = self.nvml.nvmlDeviceGetPowerUsage(self.handle) / 1000
        marks[-1].synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(marks)], clock, power

    def driver(self) -> str:
        """The driver's version."""
        return self.nvml.nvmlSystemGetDriverVersion()


def in_turns(
    calls: Mapping[str, Call], flops: float, meter: Meter, rounds: int, burst_s: float = BURST_S, rest_s: float = 0.0, seed: int = 0
) -> dict[str, dict]:
    """What each call takes: `rounds` bursts of about `burst_s` seconds, each after `rest_s` seconds of rest.

    The turns are shuffled: the clock that a burst finds depends on the power that the one before it drew. Of a burst the
    first call is left out.
    """
    counts = {}
    for name, call in calls.items():
        times, _, _ = meter.burst(call, 2 * BUFFERS)
        counts[name] = max(5, math.ceil(burst_s * 1000 / statistics.median(times)))
    readings = {name: ([], [], []) for name in calls}
    order = random.Random(seed)
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            if rest_s:
                torch.cuda.synchronize()
                time.sleep(rest_s)
            times, clock, power = meter.burst(calls[name], counts[name])
            readings[name][0].extend(times[1:])
            readings[name][1].append(clock)
            readings[name][2].append(power)
    found = {}
    for name, (times, clocks, powers) in readings.items():
        times.sort()
        median = statistics.median(times)
        found[name] = {
            "median_ms": round(median, 5),
            "p10_ms": round(times[len(times) // 10], 5),
            "p90_ms": round(times[len(times) * 9 // 10], 5),
            "calls": len(times),
            "tflops": round(flops / median / 1e9, 1),
            "sm_clock_mhz": statistics.median(clocks),
            "power_w": round(statistics.median(powers), 1),
        }
    return found
