"""The kernels as a list: each with its tile, what the compiler made of it, and whether it is in the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..compile import build
from .config import SCHEDULES, KernelConfig, available, variants
from .pairs import config as pairs


@dataclass(frozen=True)
class Entry:
    """One kernel; `built` is None where it was never compiled, `error` says why it does not compile."""

    config: KernelConfig
    built: build.Built | None
    error: str | None = None

    def to_dict(self) -> dict:
        """Plain JSON values; resources are None where the kernel is not compiled."""
        config, report = self.config, self.built.report if self.built else None
        return {
            "schedule": config.asked,
            "dtype": config.dtype,
            "head_dim": config.head_dim,
            "causal": config.causal,
            "tile": config.tile.to_dict(),
            "threads": config.threads,
            "registers": report and report.registers,
            "spill_bytes": report and report.spill_bytes,
            "smem_bytes": report and report.smem_bytes,
            "cubin_bytes": report and report.cubin_bytes,
            "compiler": report and report.compiler,
            "remarks": list(report.remarks) if report else [],
            "cached": bool(self.built and self.built.cached),
            "error": self.error,
        }


def entries(compiled: bool = False, advance: Callable[[int, int, str], None] = lambda done, total, name: None) -> list[Entry]:
    """Every kernel whose source is here, as the cache has it; with `compiled`, compiled first where it has not.

    Raises build.MissingCompiler where something must be compiled and NVRTC is not installed.
    """
    configs = [*(config for config in variants() if config.schedule in available()), *pairs.variants()]
    sources = [config.source for config in configs]
    if not compiled:
        return [Entry(config, build.lookup(source)) for config, source in zip(configs, sources, strict=True)]
    results = build.build_all(sources, advance)
    return [
        Entry(config, None, str(result)) if isinstance(result, build.CompileError) else Entry(config, result)
        for config, result in zip(configs, results, strict=True)
    ]


def missing() -> tuple[str, ...]:
    """Schedules that are to have a CUDA kernel and have none yet."""
    return tuple(schedule for schedule in SCHEDULES if schedule not in available())
