"""Few queries against many keys as a PyTorch operator, `fasim::decode`, and as a plan that `flash_attn_func` runs past it.

The kernel is `kernel.py`'s: packed GQA and split-KV. It is no schedule of its own in the tables: "auto" takes it by
shape, and `num_splits` asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from numbers import Integral
from types import ModuleType

import torch
from torch import Tensor

from ...simulator.errors import UsageError
from ..arguments import MAX_SEQLEN, check_inputs, check_storage, scale_of
from ..device import check_runnable, on_device

MAX_SPLITS = 256
"""Parts at most that `num_splits` may ask for."""
MOST_ROWS = 64
"""Query rows of a K/V head that "auto" gives to the decode kernel: one tile of them."""
FEWEST_BYTES = 8 << 20
"""Of K and V, for "auto" to take the decode kernel: below, either is over before the launch of two kernels has paid."""
ADDRESSES_KEPT = 256


@cache
def _kernel() -> ModuleType:
    """The kernel's module, imported on first use."""
    return import_module(".kernel", __package__)


@dataclass(frozen=True)
class Plan:
    """The decode kernel on tensors of one kind; `num_splits` None has the parts chosen by shape."""

    causal: bool
    num_splits: int | None = None
    seen: set[int] = field(default_factory=set, compare=False, repr=False)
    """Addresses of tensors whose storage was found whole; one that was freed has none."""

    def run(self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
        """Launch on the device's current stream, with a scale that scale_of gave; (O, LSE)."""
        addresses = q.data_ptr(), k.data_ptr(), v.data_ptr()
        if not self.seen.issuperset(addresses):
            for x in (q, k, v):
                check_storage(x)
            if len(self.seen) > ADDRESSES_KEPT:
                self.seen.clear()
            self.seen.update(addresses)
        if softmax_scale < 0:  # the kernel takes its maxima of scaled scores, as all here do for scales of 0 and above
            q, softmax_scale = -q, -softmax_scale
        with on_device(q):
            return _kernel().forward(q, k, v, softmax_scale, self.causal, num_splits=self.num_splits)


def pays(q: Tensor, k: Tensor) -> bool:
    """Whether "auto" takes the decode kernel for CUDA tensors like these: the rows of a K/V head fit one tile, and K and V are
    many bytes. Another kernel has a tile of 128 rows for each query head, which reads the same K and V, and one CTA for each
    such tile, so that a small batch leaves most SMs idle.
    """
    seqlen_q, heads = q.shape[1:3]
    kv_heads = k.shape[2]
    if not kv_heads or not 0 < seqlen_q * (heads // kv_heads) <= MOST_ROWS:
        return False
    return 2 * k.numel() * k.element_size() >= FEWEST_BYTES


def plan_for(q: Tensor, k: Tensor, causal: bool) -> Plan | None:
    """The plan that "auto" takes for tensors like these, or None where another kernel is to run."""
    if not q.is_cuda or not pays(q, k):
        return None
    try:
        check_runnable(q)
    except UsageError:  # no Triton, or a GPU that it has no kernel for here
        return None
    return Plan(causal)


def checked_splits(num_splits: object) -> int | None:
    """`num_splits` as int or None. Raises UsageError, one sentence, for anything else."""
    if num_splits is None:
        return None
    if isinstance(num_splits, Integral) and not isinstance(num_splits, bool) and 1 <= num_splits <= MAX_SPLITS:
        return int(num_splits)
    shown = repr(num_splits) if isinstance(num_splits, int | float | str) else f"a {type(num_splits).__name__}"
    raise UsageError(f"num_splits={shown[:40]} is not possible: give a whole number from 1 to {MAX_SPLITS}, or None")


@torch.library.custom_op("fasim::decode", mutates_args=())
def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool = False,
    num_splits: int | None = None,
    deterministic: bool = False,
    backward: str = "auto",
) -> tuple[Tensor, Tensor]:
    """O and LSE with the keys in `num_splits` parts; the other arguments as of flash_attn_func, the last two for the gradients."""
    _check(q, k, v)
    num_splits, softmax_scale = checked_splits(num_splits), scale_of(softmax_scale, q.shape[3])
    check_runnable(q)
    return Plan(causal, num_splits).run(q, k, v, softmax_scale)


@decode.register_fake
def _(q, k, v, softmax_scale, causal=False, num_splits=None, deterministic=False, backward="auto"):
    _check(q, k, v)
    batch, seqlen_q, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_inputs(q, k, v, "decode")
    if k.shape[2] and q.shape[1] * (q.shape[2] // k.shape[2]) > MAX_SEQLEN:
        raise UsageError(f"q of shape {tuple(q.shape)} has more than {MAX_SEQLEN:,} rows for each K/V head: leave num_splits out")
