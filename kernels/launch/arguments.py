"""How Triton passes a kernel its arguments, so that a compiled kernel can be launched past Triton's launcher, in microseconds."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from ..cuda import driver

TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
SCRATCH = 2
"""Pointers to scratch memory behind the kernel's own arguments; none for kernels that ask for none."""


class ArgumentBlock:
    """The arguments of one launch: the driver has copied them when cuLaunchKernel returns, so a thread may use its block again.

    Of a tensor map the kernel is given the map, then its sizes (32 bits each) and strides (64), which nothing reads.
    """

    def __init__(self, signature: Sequence[tuple[str, str]]) -> None:
        """`signature` is (name, type) of each argument that is not known at compile time. KeyError for a type that is none here."""
        self.values: dict[str, ctypes.c_void_p | ctypes.c_int32 | ctypes.c_int64 | ctypes.c_float] = {}
        self.maps: dict[str, int] = {}
        self.nothing = ctypes.c_uint64(0)
        addresses = []
        for name, kind in signature:
            if kind.startswith("tensordesc"):
                rank = kind[kind.index("[") : kind.index("]")].count(",") + 1
                self.maps[name] = len(addresses)
                addresses += [ctypes.addressof(self.nothing)] * (1 + 2 * rank)
            else:
                value = self.values[name] = (ctypes.c_void_p if kind.startswith("*") else TYPES[kind])()
                addresses.append(ctypes.addressof(value))
        addresses += [ctypes.addressof(self.nothing)] * SCRATCH
        self.pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        self.address = ctypes.addressof(self.pointers)
        self.call = driver.library().cuLaunchKernel
        self.call.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]

    def launch(
        self, function: ctypes.c_void_p | int, grid: int, threads: int, smem_bytes: int, stream: int, context: ctypes.c_void_p
    ) -> None:
        """Launch on a stream; `context` is given to a thread that never touched CUDA. Raises driver.DriverError."""
        arguments = (function, grid, 1, 1, threads, 1, 1, smem_bytes, stream, self.address, None)
        code = self.call(*arguments)
        if code == driver.INVALID_CONTEXT:
            driver.call("cuCtxSetCurrent", context)
            code = self.call(*arguments)
        if code:
            raise driver.DriverError("cuLaunchKernel", code)
