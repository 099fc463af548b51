"""Gluon to an sm_90a cubin by the Triton that is installed; kept in Triton's own cache. No GPU is needed."""

from __future__ import annotations

import importlib
import os
import re
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context

from ...simulator.errors import UsageError
from ..compile.triton_cache import ensure_writable
from .config import REGISTERS, GluonConfig, module_of

ENTRY = "attention_forward"
POINTERS_AND_SIZES = {"lse": "*fp32", "queue": "*i32", "scale_log2": "fp32"}
"""Types of arguments that are neither a tensor map nor a 32-bit whole number."""


@dataclass(frozen=True)
class Built:
    """A cubin, what a launch of it needs, and the PTX it was made of."""

    cubin: bytes
    ptx: str
    smem_bytes: int
    threads: int
    compiler: str
    signature: tuple[tuple[str, str], ...]  # (name, Triton's type) of the arguments of a launch


def build_all(configs: Iterable[GluonConfig]) -> dict[GluonConfig, str]:
    """Compile kernels, a process a core, into the cache that `build` reads; of each "" or why it is refused."""
    distinct = list(dict.fromkeys(configs))
    with ProcessPoolExecutor(min(len(distinct), len(os.sched_getaffinity(0))), mp_context=get_context("spawn")) as pool:
        return dict(zip(distinct, pool.map(_failure_of, distinct), strict=True))


def _failure_of(config: GluonConfig) -> str:
    try:
        build(config)
    except UsageError as error:
        return str(error)
    return ""


@cache
def build(config: GluonConfig) -> Built:
    """Compile one kernel. Raises UsageError where the installed Triton has no Gluon or does not take the kernel."""
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon._runtime import GluonASTSource
    except ImportError as error:
        raise UsageError(f"backend='gluon' needs Triton 3.6 or newer ({error})") from error
    ensure_writable()
    function = importlib.import_module(f".{module_of(config.schedule)}", __package__).attention_forward
    constants = {
        "BLOCK_N": config.block_n,
        "HEAD_DIM": config.head_dim,
        "STAGES": config.stages,
        "CAUSAL": config.causal,
        "CONSUMERS": config.consumers,
        "MASKED": config.masked,
        "NAMED": config.named,
        "O_TILES": config.o_tiles,
        "CONSUMER_REGISTERS": REGISTERS[config.consumers][0],
        "PRODUCER_REGISTERS": REGISTERS[config.consumers][1],
    }
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    boxes = {"q": config.q_rows, "k": config.block_n, "v": config.block_n, "o": config.q_rows}
    signature = {}
    for name in function.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in boxes:
            signature[name] = f"tensordesc<{config.dtype}[1,1,{boxes[name]},{config.head_dim}],{layout!r}>"
        else:
            signature[name] = POINTERS_AND_SIZES.get(name, "i32")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 3.9 says that a default of 3.10's will be another
            compiled = triton.compile(
                GluonASTSource(function, signature, constants, {}),
                target=GPUTarget("cuda", 90, 32),
                options={"num_warps": config.num_warps},
            )
    except Exception as error:
        cause = " ".join(str(error).split())[-200:]
        raise UsageError(f"Triton {triton.__version__} does not compile the Gluon kernel {config.name!r}: {cause}") from error
    threads = int(re.search(r"\.reqntid (\d+)", compiled.asm["ptx"])[1])
    arguments = tuple((name, kind) for name, kind in signature.items() if kind != "constexpr")
    smem_bytes, compiler = compiled.metadata.shared, f"Triton {triton.__version__}"
    return Built(compiled.asm["cubin"], compiled.asm["ptx"], smem_bytes, threads, compiler, arguments)
