"""The few calls of the CUDA driver that a launch needs, through ctypes: a microsecond each, where wrappers take several."""

from __future__ import annotations

import ctypes
from functools import cache

INVALID_CONTEXT = 201
MAX_DYNAMIC_SMEM = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
TENSOR_MAP_BYTES = 128
TENSOR_MAP_ALIGNMENT = 64

# CUtensorMap enumerations (CUDA driver API, tensor map object management)
DATA_TYPE = {"fp16": 6, "bf16": 9, "e4m3": 0, "fp32": 7}  # e4m3 travels as bytes
ELEMENT_BYTES = {"fp16": 2, "bf16": 2, "e4m3": 1, "fp32": 4}
INTERLEAVE_NONE = 0
SWIZZLE_NONE = 0
SWIZZLE = {32: 1, 64: 2, 128: 3}  # by the bytes of a box's row, which is swizzled over itself; a longer one lies as it is
L2_PROMOTION_256B = 3
FILL_ZEROS = 0


class DriverError(RuntimeError):
    """A call of the CUDA driver failed; the message has its name for the error."""

    def __init__(self, call: str, code: int) -> None:
        text = ctypes.c_char_p()
        library().cuGetErrorName(code, ctypes.byref(text))
        super().__init__(f"{call} failed: {(text.value or b'unknown error').decode()} ({code})")
        self.code = code


@cache
def library() -> ctypes.CDLL:
    """libcuda, which the NVIDIA driver installs; OSError without one."""
    return ctypes.CDLL("libcuda.so.1")


def call(name: str, *arguments: object) -> None:
    """Call the driver; raises DriverError."""
    code = getattr(library(), name)(*arguments)
    if code:
        raise DriverError(name, code)


@cache
def primary_context(device: int) -> ctypes.c_void_p:
    """The context that PyTorch and the CUDA runtime use on a device."""
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    call("cuDeviceGet", ctypes.byref(handle), device)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
    return context


def ensure_context(device: int) -> None:
    """Give this thread the device's context where it has none yet: PyTorch sets one only when it calls the runtime."""
    current = ctypes.c_void_p()
    call("cuCtxGetCurrent", ctypes.byref(current))
    if not current:
        call("cuCtxSetCurrent", primary_context(device))


def load_kernel(cubin: bytes, name: str, smem_bytes: int) -> ctypes.c_void_p:
    """A kernel of a cubin, loaded into the current context and allowed its dynamic shared memory."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    call("cuModuleLoadData", ctypes.byref(module), cubin)
    call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
    call("cuFuncSetAttribute", function, MAX_DYNAMIC_SMEM, smem_bytes)
    return function


class TensorMap:
    """A CUtensorMap in host memory, aligned as the driver wants it; `address` is where."""

    __slots__ = ("_buffer", "address")

    def __init__(
        self, pointer: int, dtype: str, sizes: tuple[int, ...], strides_bytes: tuple[int, ...], box: tuple[int, ...]
    ) -> None:
        """Sizes and box count elements, innermost first; strides leave out the innermost. Raises DriverError."""
        self._buffer = ctypes.create_string_buffer(TENSOR_MAP_BYTES + TENSOR_MAP_ALIGNMENT)
        start = ctypes.addressof(self._buffer)
        self.address = -(-start // TENSOR_MAP_ALIGNMENT) * TENSOR_MAP_ALIGNMENT
        rank = len(sizes)
        call(
            "cuTensorMapEncodeTiled",
            ctypes.c_void_p(self.address),
            DATA_TYPE[dtype],
            rank,
            ctypes.c_void_p(pointer),
            (ctypes.c_uint64 * rank)(*sizes),
            (ctypes.c_uint64 * (rank - 1))(*strides_bytes),
            (ctypes.c_uint32 * rank)(*box),
            (ctypes.c_uint32 * rank)(*(1,) * rank),
            INTERLEAVE_NONE,
            SWIZZLE.get(box[0] * ELEMENT_BYTES[dtype], SWIZZLE_NONE),
            L2_PROMOTION_256B,
            FILL_ZEROS,
        )
