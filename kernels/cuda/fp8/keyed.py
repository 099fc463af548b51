"""Kernels whose V comes as rows of keys (kernels/fp8/keyed.py), so that none of them transposes it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from ...compile.build import Source
from .config import FITS, HERE, Fp8Config, config_for, headers

WIDTHS = (128, 64, 32)
"""Keys of a row that TMA swizzles."""


@dataclass(frozen=True)
class KeyedConfig(Fp8Config):
    """An FP8 kernel whose V lies as rows of keys: the same schedule and headers, another producer."""

    @property
    def name(self) -> str:
        """As it is spoken of."""
        return super().name + " keyed"

    @property
    def source(self) -> Source:
        """The schedule's text over the headers with the other producer."""
        plain = super().source
        return replace(plain, headers=keyed_headers())


def keyed(config: Fp8Config) -> KeyedConfig:
    """The sibling of a kernel: a block of V is whole panels of keys; the slot of V as loaded is not used."""
    panel = next(keys for keys in WIDTHS if config.fit.tile.block_n % keys == 0)
    fields = {name: getattr(config, name) for name in Fp8Config.__dataclass_fields__}
    return KeyedConfig(**fields | {"fit": replace(config.fit, v_stages=1, key_panel=panel)})


def keyed_config_for(*arguments, **named) -> KeyedConfig:
    """The sibling of what config.config_for gives."""
    return keyed(config_for(*arguments, **named))


def keyed_variants() -> list[KeyedConfig]:
    """Those that `flash_attn_fp8` would take: descales of blocks, O in bf16, exact."""
    return [
        keyed(Fp8Config("fa3", "bf16", head_dim, causal, fit, block_scales=True))
        for head_dim, fits in FITS.items()
        for fit in fits
        for causal in (False, True)
    ]


@lru_cache(maxsize=1)
def keyed_headers() -> dict[str, str]:
    """The FP8 kernels' headers with the producer of this folder, which includes theirs by another name."""
    own = headers()
    producer = (HERE / "keyed" / "producer.cuh").read_text(encoding="utf-8")
    return own | {"transposing_producer.cuh": own["producer.cuh"], "producer.cuh": producer}
