"""The GPU as its driver reports it through NVML: SM clock, power, energy. Needs nvidia-ml-py, not torch."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ..validation.check import MissingTool


@dataclass(frozen=True)
class Sample:
    """One reading: host time in seconds, SM clock, board power, energy since the driver was loaded."""

    host_s: float
    clock_hz: float
    power_w: float | None
    energy_j: float | None


class Board:
    """A GPU by NVML index, or by UUID (GPU-...), which holds where CUDA hides some. Raises MissingTool where it is not there."""

    def __init__(self, index: int = 0, uuid: str | None = None) -> None:
        try:
            import pynvml
        except ModuleNotFoundError:
            raise MissingTool("clock and power are read by NVML, whose bindings are missing: pip install nvidia-ml-py") from None
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid) if uuid else pynvml.nvmlDeviceGetHandleByIndex(index)
        except pynvml.NVMLError as error:
            raise MissingTool(f"NVML finds no NVIDIA GPU here ({error}): it needs a machine with one and its driver") from error

    @property
    def name(self) -> str:
        """As nvidia-smi prints it, e.g. NVIDIA H200."""
        return _text(self._nvml.nvmlDeviceGetName(self._handle))

    @property
    def driver(self) -> str:
        """The driver's version."""
        return _text(self._nvml.nvmlSystemGetDriverVersion())

    @property
    def compute_capability(self) -> tuple[int, int]:
        """(major, minor), (9, 0) for Hopper."""
        return tuple(self._nvml.nvmlDeviceGetCudaComputeCapability(self._handle))

    @property
    def power_limit_w(self) -> float:
        """The enforced limit in watts."""
        return self._nvml.nvmlDeviceGetEnforcedPowerLimit(self._handle) / 1000

    def sample(self) -> Sample:
        """Read everything once, which takes about a millisecond."""
        clock = self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM)
        return Sample(time.perf_counter(), clock * 1e6, self._power(), self._energy())

    def _power(self) -> float | None:
        """Instant power where the driver has it; the averaged one reacts a second later."""
        try:
            (field,) = self._nvml.nvmlDeviceGetFieldValues(self._handle, [self._nvml.NVML_FI_DEV_POWER_INSTANT])
            if field.nvmlReturn == self._nvml.NVML_SUCCESS:
                return field.value.uiVal / 1000
            return self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000
        except (self._nvml.NVMLError, AttributeError):
            return None

    def _energy(self) -> float | None:
        try:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000
        except self._nvml.NVMLError:
            return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
