"""The SM clock as the SMs count it: cycles over nanoseconds between two moments of a stream.

NVML reports the frequency that was asked for; under load the SMs lose pulses of it, and a kernel runs at fewer cycles per
second than NVML says. Each SM's own %clock64 runs on across kernels, so a kernel of a microsecond that writes it down
beside %globaltimer, before and after, gives the mean clock of all that ran between.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from ...simulator.errors import UsageError
from ..validation.check import MissingTool

SLOTS = 4096
"""Moments in one block of device memory; another is added when it is full."""
_SOURCE = """
extern "C" __global__ void probe(long long *out, long long slot, long long sms) {
  if (threadIdx.x) return;
  unsigned sm;
  long long cycles, nanoseconds;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(cycles)::"memory");
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds)::"memory");
  long long *mine = out + (slot * sms + sm) * 2;
  mine[0] = cycles;
  mine[1] = nanoseconds;
}
"""


class ClockProbe:
    """Moments of the current stream, each with every SM's cycle counter and the time.

    Raises MissingTool where the kernel cannot be compiled or loaded (it needs NVRTC, cuda-core and a GPU of sm_90a).
    """

    def __init__(self, sms: int) -> None:
        try:
            from ..calibrate.harness import Module

            self._module = Module(_SOURCE)
        except (ImportError, RuntimeError, UsageError) as error:
            raise MissingTool(f"the SMs' clock cannot be read here: {error}") from error
        self.sms = sms
        self._next = 0
        self._logs = {0: self._log()}  # by moment // SLOTS
        self.stamp()  # loads the kernel

    def _log(self):
        import torch

        return torch.zeros((SLOTS, self.sms, 2), dtype=torch.int64, device="cuda")

    def stamp(self) -> int:
        """Enqueue a moment and return its number."""
        number, self._next = self._next, self._next + 1
        block, slot = divmod(number, SLOTS)
        if block not in self._logs:
            self._logs[block] = self._log()
        self._module.launch("probe", self.sms, 1024, [self._logs[block], slot, self.sms])  # 1024 threads spread them out
        return number

    def clocks_hz(self, moments: list[int]) -> list[float]:
        """Mean clock between each moment and the next, the median over SMs. Waits for the stream, and forgets whole blocks of
        moments before the last."""
        read = {block: log.cpu().numpy() for block, log in self._logs.items() if block in {each // SLOTS for each in moments}}
        seen = np.stack([read[moment // SLOTS][moment % SLOTS] for moment in moments])
        for block in [each for each in self._logs if each < (self._next - 1) // SLOTS]:
            del self._logs[block]
        return clocks_hz(seen)


def clocks_hz(seen: np.ndarray) -> list[float]:
    """Clocks between consecutive rows of (moments, SMs, [cycles, nanoseconds]); an SM that wrote nothing (0) does not count."""
    found = []
    for before, after in pairwise(seen):
        both = (before[:, 1] > 0) & (after[:, 1] > before[:, 1])
        spent = (after - before)[both].astype(np.float64)
        found.append(float(np.median(spent[:, 0] / spent[:, 1])) * 1e9 if len(spent) else float("nan"))
    return found
