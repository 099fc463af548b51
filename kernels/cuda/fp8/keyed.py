"""Kernels whose V comes as rows of keys (kernels/fp8/keyed.py), so that none of them transposes it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from ...compile.build import Source
from .config import FITS, HERE, Fp8Config, config_for, headers

WIDTHS = (128, 64, 32)
"""Keys of a row that TMA swizzles."""
WITHOUT_TURNS = (128,)
"""Head dims at which turns cost a percent where nobody transposes (fp8/NOTES.md): their order is overlap-2stage's."""
NARROW_UP_TO = {128: 2048}
"""By head dim, the keys up to which the tile of the shortest rows is the faster one under a causal mask, where descales are of
heads: those of blocks know no mask."""


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
    schedule = "overlap-2stage" if config.head_dim in WITHOUT_TURNS else config.schedule
    return KeyedConfig(**fields | {"schedule": schedule, "fit": replace(config.fit, v_stages=1, key_panel=panel)})


def keyed_config_for(output: str, head_dim: int, causal: bool, seqlen_k: int, block_scales: bool, approximate: bool) -> KeyedConfig:
    """The kernel for so many keys; UsageError where there is none."""
    config = config_for("fa3", output, head_dim, causal, seqlen_k, block_scales, False, approximate)
    if causal and not block_scales and seqlen_k <= NARROW_UP_TO.get(head_dim, 0):
        config = replace(config, fit=FITS[head_dim][0])
    return keyed(config)


def keyed_variants() -> list[KeyedConfig]:
    """Those with O in bf16, exact, with descales of heads and of blocks: `flash_attn_fp8` takes the latter."""
    return [
        keyed(Fp8Config("fa3", "bf16", head_dim, causal, fit, block_scales=block_scales))
        for head_dim, fits in FITS.items()
        for fit in fits
        for block_scales in (False, True)
        for causal in (False, True)
    ]


@lru_cache(maxsize=1)
def keyed_headers() -> dict[str, str]:
    """The FP8 kernels' headers with the producer of this folder, which includes theirs by another name."""
    own = headers()
    producer = (HERE / "keyed" / "producer.cuh").read_text(encoding="utf-8")
    return own | {"transposing_producer.cuh": own["producer.cuh"], "producer.cuh": producer}
