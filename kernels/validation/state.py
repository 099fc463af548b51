"""What a process shares, and a kernel should leave as it found it."""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch


class Shared(NamedTuple):
    """One thing that code shares with everything else in its process; `read` and `write` it.

    `decides` says that other code computes something else, or somewhere else, when it changes. `write` is None for the
    states of random generators, which nothing here depends on.
    """

    read: Callable
    write: Callable | None
    decides: bool = True


def set_determinism(mode: int) -> None:
    """0 for any algorithm, 1 for deterministic ones with a warning where there is none, 2 with an error.

    torch.use_deterministic_algorithms also tells torch.compile, and for that imports all of it: seconds, which only a process
    that compiles need pay.
    """
    if "torch._inductor.config" in sys.modules:
        torch.use_deterministic_algorithms(mode > 0, warn_only=mode == 1)
    else:
        torch.set_deterministic_debug_mode(mode)


def _sdpa_backends() -> tuple[bool, ...]:
    cuda = torch.backends.cuda
    return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()


def _enable_sdpa_backends(enabled: tuple[bool, ...]) -> None:
    cuda = torch.backends.cuda
    switches = (cuda.enable_flash_sdp, cuda.enable_mem_efficient_sdp, cuda.enable_math_sdp, cuda.enable_cudnn_sdp)
    for switch, on in zip(switches, enabled, strict=True):
        switch(on)


def _filters(found: list) -> None:
    warnings.filters[:] = found


SHARED: dict[str, Shared] = {
    "the default dtype": Shared(torch.get_default_dtype, torch.set_default_dtype),
    "the default device": Shared(
        torch.get_default_device, lambda found: torch.set_default_device(None if found.type == "cpu" else found)
    ),
    "grad mode": Shared(torch.is_grad_enabled, torch.set_grad_enabled),
    "deterministic algorithms": Shared(torch.get_deterministic_debug_mode, set_determinism),
    "the precision of fp32 matrix products": Shared(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "PyTorch's attention backends": Shared(_sdpa_backends, _enable_sdpa_backends),
    "autocast": Shared(
        lambda: (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        lambda on: (torch.set_autocast_enabled("cpu", on[0]), torch.set_autocast_enabled("cuda", on[1])),
    ),
    "PyTorch's random numbers": Shared(torch.get_rng_state, None),
    "Python's random numbers": Shared(random.getstate, None, decides=False),
    "the number of threads": Shared(torch.get_num_threads, torch.set_num_threads, decides=False),
    "the recursion limit": Shared(sys.getrecursionlimit, sys.setrecursionlimit, decides=False),
    "the filters of warnings": Shared(lambda: list(warnings.filters), _filters, decides=False),
    "the working directory": Shared(os.getcwd, os.chdir, decides=False),
}
"""What is read before and after a call."""

ON_GPU: dict[str, Shared] = {
    "the current CUDA device": Shared(torch.cuda.current_device, torch.cuda.set_device),
    "the current CUDA stream": Shared(torch.cuda.current_stream, torch.cuda.set_stream),
    "PyTorch's random numbers on the GPU": Shared(torch.cuda.get_rng_state, None),
}


def _all() -> dict[str, Shared]:
    return SHARED | (ON_GPU if torch.cuda.is_initialized() else {})


def read() -> dict[str, object]:
    """What can be read of the state now, by name."""
    found = {}
    for name, shared in _all().items():
        with suppress(Exception):  # what PyTorch of this version cannot say is not looked at
            found[name] = shared.read()
    return found


def put_back(before: dict[str, object]) -> list[str]:
    """Write what differs from `before`; the names of what did, random generators included."""
    changed = []
    for name, shared in _all().items():
        if name in before:
            with suppress(Exception):
                if not _same(before[name], shared.read()):
                    changed.append(name)
                    if shared.write is not None:
                        shared.write(before[name])
    return changed


def decisive(changed: list[str]) -> list[str]:
    """Those of `changed` that decide what other code computes, or where."""
    return [name for name in changed if (SHARED | ON_GPU)[name].decides]


def _same(before: object, after: object) -> bool:
    """Whether two readings of one thing are equal."""
    return torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after
