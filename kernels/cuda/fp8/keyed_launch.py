"""Launches the kernels whose V comes as rows of keys."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ...fp8.arguments import check, check_rows_of_keys
from ...fp8.keyed import GROUP
from .config import QUERY_ROWS
from .keyed import KeyedConfig, keyed_config_for
from .launch import OUTPUTS, Plan, _Operand


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    block_scales: bool = False,
    approximate: bool = False,
) -> tuple[Tensor, Tensor]:
    """As launch.forward, v being fp8.keyed.as_rows_of_keys of V: (B, H_kv, D, S16)."""
    _, seqlen_k, _, head_dim = k.shape
    config = keyed_config_for(OUTPUTS[dtype], head_dim, bool(causal), seqlen_k, block_scales, approximate)
    rows = config.fit.tile.block_n
    descales = (q_descale, k_descale, v_descale)
    check(q, k, k, descales, softmax_scale, dtype, (QUERY_ROWS, rows, rows) if block_scales else ())
    check_rows_of_keys(k, v)
    if block_scales:
        descales = tuple(None if x is None else x.contiguous() for x in descales)
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    plan = plan_for(config, tuple(q.shape), tuple(k.shape), (q.stride(), k.stride()), q.get_device())
    return plan.run(q, k, v, descales, scale)


class KeyedPlan(Plan):
    """A plan whose V is described as it lies: a box is a panel of keys by all columns."""

    def __init__(self, config: KeyedConfig, q_shape: tuple, k_shape: tuple, strides: tuple, device: int) -> None:
        super().__init__(config, q_shape, k_shape, (*strides, strides[1]), device)
        if self.empty:
            return
        batch, seqlen, heads, head_dim = k_shape
        keys = -(-seqlen // GROUP) * GROUP
        steps = (heads * head_dim * keys, keys, head_dim * keys, 1)
        self.inputs[2] = _Operand("e4m3", (batch, head_dim, heads, keys), steps, (config.fit.key_panel, head_dim))


@lru_cache(maxsize=512)
def plan_for(config: KeyedConfig, q_shape: tuple, k_shape: tuple, strides: tuple, device: int) -> KeyedPlan:
    """The plan of a launch."""
    return KeyedPlan(config, q_shape, k_shape, strides, device)
