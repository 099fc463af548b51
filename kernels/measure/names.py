"""Whose kernel it is that is measured: how it is called, which files it is made of, which tile it takes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from ...simulator.errors import UsageError
from ...simulator.problem import parts
from ...simulator.problem.tile import Tile
from ...simulator.problem.workload import Workload
from ...simulator.schedules import BACKWARD as SIMULATED
from ..cuda.backward import config as backward
from ..cuda.config import DTYPES as CUDA_DTYPES
from ..cuda.config import HEAD_DIMS, config_for
from ..cuda.config import SCHEDULES as CUDA_SCHEDULES
from ..cuda.fp8 import config as fp8
from ..gluon import config as gluon
from ..validation.check import Case, HeadDim
from ..validation.subjects import Subject, resolve
from . import gradients, packed, peers
from .gradients import SAME_BITS

ROOM = Path(__file__).parents[1]
DECODE = "decode"
SHARED = ("arithmetic", "loads", "tiles")
"""Of triton/, beside a kernel's own file."""


def implementation_of(kernel: str) -> str:
    """Whose kernel it is: "cuda", "gluon" or "triton" (ours), "pytorch", "peer", or "callable"."""
    if peers.is_peer(kernel):
        return "peer"
    if ":" in kernel:
        return "callable"
    if kernel.startswith("torch-"):
        return "pytorch"
    if kernel in gluon.NAMES:
        return "gluon"
    return "cuda" if kernel.removesuffix(SAME_BITS) in (*CUDA_SCHEDULES, *backward.SCHEDULES) else "triton"


def subject_of(kernel: str, device: str = "cuda", direction: str = "forward") -> Subject:
    """The kernel by its name; raises as `subjects.resolve` does."""
    if peers.is_peer(kernel):
        return peers.subject_of(kernel)
    if direction == "backward":
        if kernel.removesuffix(SAME_BITS) in backward.SCHEDULES:
            return _backward_of(kernel)
        if kernel in (*CUDA_SCHEDULES, *SIMULATED) and kernel not in gradients.OURS:
            possible = ", ".join(gradients.OURS)
            raise UsageError(f"the backward of {kernel!r} has no kernel here ({possible}); fasim predict has it as a schedule")
    if kernel == DECODE:
        return _few_queries()
    if kernel not in CUDA_SCHEDULES:
        return resolve(kernel, device)
    from ..ops import flash_attn_func

    def forward(q, k, v, *, causal=False, softmax_scale=None):
        return flash_attn_func(q, k, v, softmax_scale=softmax_scale, causal=causal, schedule=kernel, return_lse=True)

    dtypes = (*CUDA_DTYPES, "e4m3") if kernel in fp8.SCHEDULES else CUDA_DTYPES
    return Subject(name=kernel, forward=forward, head_dims=HEAD_DIMS, dtypes=dtypes, needs_cuda=True, returns_lse=True)


def _few_queries() -> Subject:
    """The kernel of few queries against many keys, in as many parts as it chooses."""
    from ..arguments import default_scale
    from ..decode.operator import Plan

    def forward(q, k, v, *, causal=False, softmax_scale=None):
        return Plan(causal).run(q, k, v, softmax_scale or default_scale(q.shape[3]))

    return Subject(name=DECODE, forward=forward, head_dims=HEAD_DIMS, dtypes=CUDA_DTYPES, needs_cuda=True, returns_lse=True)


def _backward_of(kernel: str) -> Subject:
    """A CUDA backward; what is called is gradients.py's."""
    dims = tuple(sorted({head_dim for schedule, head_dim, _ in backward.TILES if schedule == kernel.removesuffix(SAME_BITS)}))

    def forward(q, k, v, *, causal=False, softmax_scale=None):
        raise NotImplementedError("a backward is prepared for one workload before it is called")

    return Subject(name=kernel, forward=forward, head_dims=tuple(map(HeadDim, dims)), dtypes=backward.DTYPES, needs_cuda=True)


def sources_of(subject: Subject, workload: Workload) -> dict[str, str]:
    """Path within the package -> SHA-256, of the files that make up a kernel of ours; of others', their library's or module's."""
    file = subject.name.replace("-", "_") + ("_backward" if workload.backward else "")
    match implementation_of(subject.name):
        case "cuda" if workload.backward:
            room, own = backward.HERE, gradients.files_of(subject.name)
            paths = [*own, *sorted(room.parent.glob("*.cuh"))]
        case "cuda":
            room = ROOM / "cuda"
            own = [*sorted(fp8.HERE.glob("*.cuh")), fp8.HERE / "wgmma.py"] if workload.dtype == "e4m3" else [room / "wgmma.py"]
            if workload.lengths:
                own += [path for path in sorted((room / "varlen").iterdir()) if path.suffix in packed.SUFFIXES]
            paths = [room / f"{file}.cu", *sorted(room.glob("*.cuh")), *own]
        case "gluon":
            paths = gluon.sources_of(subject.name.removeprefix(gluon.PREFIX))
        case "triton" if subject.name == DECODE:
            paths = [*sorted((ROOM / "decode").glob("*.py")), *(ROOM / "triton" / f"{each}.py" for each in SHARED)]
        case "triton":
            paths = [ROOM / "triton" / f"{each}.py" for each in (file, *SHARED)]
        case "peer":
            return peers.sources_of(subject.name, workload.backward)
        case _:
            return {path.name: _sha256(path) for path in subject.sources}
    return {path.relative_to(ROOM.parent).as_posix(): _sha256(path) for path in paths}


def packages_of(kernel: str) -> dict[str, str]:
    """The library that a peer comes with, and its version; nothing for every other kernel."""
    return peers.packages_of(kernel) if peers.is_peer(kernel) else {}


def tile_of(kernel: str, workload: Workload) -> Tile | None:
    """The tile our CUDA or Gluon kernel takes for a workload; None where it is not known."""
    if implementation_of(kernel) == "gluon":
        config = gluon.config_for(
            kernel.removeprefix(gluon.PREFIX), workload.dtype, workload.head_dim, workload.causal, workload.seqlen_k
        )
        return Tile(config.block_m, config.block_n, config.stages, config.consumers)
    if kernel == DECODE:
        import torch

        return parts.tile_for(workload, torch.cuda.get_device_properties(0).multi_processor_count)
    if implementation_of(kernel) != "cuda":
        return None
    if workload.backward:
        return backward.config_for(kernel.removesuffix(SAME_BITS), workload.dtype, workload.head_dim, workload.causal).tile
    if workload.dtype == "e4m3":
        return fp8.config_for(kernel, "bf16", workload.head_dim, workload.causal, workload.seqlen_k).fit.tile
    return config_for(kernel, workload.dtype, workload.head_dim, workload.causal).tile


def accept(subject: Subject, workload: Workload) -> None:
    """UsageError where the workload lies outside what the kernel promises."""
    if workload.backward and workload.dtype == "e4m3":
        raise UsageError("the backward takes fp16 and bf16: e4m3 is for the forward alone")
    if workload.lengths:
        packed.require(subject.name)
    if workload.dtype not in subject.dtypes:
        raise UsageError(f"dtype={workload.dtype} is not supported by '{subject.name}' ({', '.join(subject.dtypes)})")
    if workload.head_dim not in subject.head_dims and implementation_of(subject.name) != "callable":
        raise UsageError(
            f"head_dim={workload.head_dim} is not supported by '{subject.name}' ({', '.join(map(str, subject.head_dims))})"
        )
    case = Case(
        name="measure", batch=workload.batch, heads=workload.heads, kv_heads=workload.kv_heads, head_dim=workload.head_dim,
        seqlen_q=workload.seqlen_q, seqlen_k=workload.seqlen_k, causal=workload.causal,
    )  # fmt: skip
    if reason := subject.refuses(case):
        raise UsageError(f"{subject.name} does not take {workload}: {reason}")


def caller(subject: Subject, workload: Workload) -> Callable:
    """f(q, k, v) -> O or (O, LSE), of packed sequences f(q, k, v, cu_seqlens_q, cu_seqlens_k): the kernel and nothing beside it
    (validation tidies PyTorch's LSE up, which takes kernels)."""
    if workload.lengths:
        return packed.caller(workload)
    if peers.is_peer(subject.name):
        return peers.prepare(subject.name, workload)
    if subject.name in ("torch-fa2", "torch-cudnn"):
        return peers.prepare(subject.name.replace("torch-", peers.PREFIX), workload)
    return lambda q, k, v: subject.forward(q, k, v, causal=workload.causal)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
