"""Where a kernel can be launched, and from which thread: what every operator asks before it runs one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..simulator.errors import UsageError
from .cuda import driver


def check_runnable(q: Tensor) -> None:
    """Raise UsageError unless a Triton kernel can run on q's device."""
    try:
        import triton
    except ImportError:
        raise UsageError("these kernels need Triton, which is not installed: pip install 'fasim[kernels]'") from None
    if q.is_cuda:
        if torch.cuda.get_device_capability(q.device) < (8, 0):
            name = torch.cuda.get_device_name(q.device)
            raise UsageError(f"the kernels need an NVIDIA GPU of compute capability 8.0 or more, and {name} has less")
        from .compile import triton_cache

        triton_cache.ensure_writable()
        return
    if not triton.knobs.runtime.interpret:
        raise UsageError(
            f"q is on {q.device.type!r} and the kernels run on CUDA devices: move q, k and v with .cuda(), or set"
            " TRITON_INTERPRET=1 before Python starts to interpret them, slowly, on the CPU"
        )


@contextmanager
def on_device(q: Tensor) -> Iterator[None]:
    """Launch on q's device and its current stream, in whatever thread: a fresh one has no CUDA context, which TMA needs."""
    if not q.is_cuda:
        yield
        return
    device = q.get_device()
    if torch._C._cuda_getDevice() == device:  # changing to the device that is current takes longer than to ask
        driver.ensure_context(device)
        yield
        return
    with torch.cuda.device(device):
        driver.ensure_context(device)
        yield
