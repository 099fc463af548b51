"""Profiles of compiled kernels, kept under simulator/code/profiles: ours, and FlashAttention-3's from its wheel. No GPU is needed.

python -m fasim.kernels.compile.profile ours
python -m fasim.kernels.compile.profile fa3-fwd-0.0.3 fa3_fwd/_C.abi3.so
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ...simulator.code import loop_reader, sass
from ...simulator.code.profiles import HERE, OURS, Profile, write
from ...simulator.errors import UsageError
from ..cuda.config import KernelConfig, variants
from . import disassemble
from .build import build_all

_FLAGS = "causal local softcap varlen paged append q_v p_in_registers overlap packed_gqa split column_v".split()
_FORWARD = re.compile(r"CollectiveMainloopFwdSm90.*?EEELi(\d+)ENS_\d+(bfloat16_t|half_t|float_e4m3_t)E.*?4Sm90E((?:Lb[01]E){12})")
_DTYPES = {"bfloat16_t": "bf16", "half_t": "fp16", "float_e4m3_t": "e4m3"}


def of_ours(config: KernelConfig, code: sass.Code, compiler: str) -> Profile:
    """One of our kernels."""
    pipeline = loop_reader.read(code)
    source = config.source
    return Profile(
        config.schedule, config.head_dim, config.dtype, config.causal, config.name, "kernels/cuda", source.digest, compiler,
        disassembler(), pipeline,
    )  # fmt: skip


def ours() -> Iterator[Profile]:
    """Every variant in fp16, compiled by the NVRTC that is installed."""
    configs = [config for config in variants() if config.dtype == "fp16"]
    for config, built in zip(configs, build_all([config.source for config in configs]), strict=True):
        (code,) = disassemble.of_cubin(built.cubin)
        yield of_ours(config, code, built.report.compiler)


def of_flash_attention_3(library: Path, origin: str) -> Iterator[Profile]:
    """Its forward kernels of fixed length, one head dimension for Q, K and V, without any extra."""
    digest = hashlib.sha256(library.read_bytes()).hexdigest()
    for code in disassemble.kernels_of(library, "FlashAttnFwdSm90", modules=1000):
        found = _FORWARD.search(code.name)
        if not found:
            continue
        flags = dict(zip(_FLAGS, (each == "1" for each in re.findall(r"Lb([01])E", found[3])), strict=True))
        if any(flags[name] for name in _FLAGS if name not in ("causal", "p_in_registers", "overlap")):
            continue
        try:
            pipeline = loop_reader.read(code)
        except UsageError:  # V of another width than Q and K
            continue
        yield Profile(
            "fa3-published", pipeline.head_dim, _DTYPES[found[2]], flags["causal"], code.name, origin, digest, "as shipped",
            disassembler(), pipeline,
        )  # fmt: skip


def disassembler() -> str:
    """nvdisasm and its version."""
    said = subprocess.run([disassemble.tool("nvdisasm"), "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release [\d.]+, V([\d.]+)", said)
    return f"nvdisasm {found[1] if found else ''}".strip()


def main() -> None:
    """Write the file that is named."""
    name, *library = sys.argv[1:]
    profiles = of_flash_attention_3(Path(library[0]), name) if library else ours()
    write(HERE / f"{name if library else OURS}.json", profiles)


if __name__ == "__main__":
    main()
