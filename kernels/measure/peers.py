"""Other people's kernels by name, where their wheel is installed: peer:fa3, peer:fa4, peer:cudnn, peer:fa2, peer:flex.

Each is called as its users call it, in our layout (B, S, H, D), and nothing else runs beside it. A library may launch
small kernels of its own around its attention (a counter set to zero, a combine): the attention is told from them by its
name, or is the longest. Its tile stands in its name, which is how the model gets to know it.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path

from ...simulator.errors import UsageError, did_you_mean
from ...simulator.problem.tile import Tile
from ...simulator.problem.workload import Workload
from ...simulator.results.run import Run
from ...traces import nsight
from ...traces.nsight import Profiled
from ..validation.check import MissingTool
from ..validation.subjects import HALF, Subject, resolve

PREFIX = "peer:"
Attend = Callable[..., object]
"""f(q, k, v) -> O or (O, LSE), for one workload."""
Gradient = Callable[..., Callable[[], tuple]]
"""f(q, k, v, dO) -> a call that gives dQ, dK and dV; the forward that they follow from is done at once, and is no part of it."""
LONGEST_NAME = 1200
"""Characters kept of a kernel's name: a template's arguments can be thousands."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A library's attention, forward and where it is asked for backward.

    `package` is the distribution that brings it and `beside` those whose versions decide what runs too; `files` are the
    ends of the paths, within the package, of what holds the kernel, `backward_files` those of the backward where they are others.
    `attention` is a part of its kernels' names. `differentiate` is None where the backward is not asked for.
    """

    title: str
    package: str
    files: tuple[str, ...]
    attention: str
    prepare: Callable[[Workload], Attend]
    differentiate: Callable[[Workload], Gradient] | None = None
    backward_files: tuple[str, ...] = ()
    backward_tile: Callable[[Workload], Tile | None] = lambda workload: None  # where no kernel's name tells it
    dtypes: tuple[str, ...] = HALF
    head_dims: tuple[int, ...] = (64, 128, 256)
    beside: tuple[str, ...] = ()
    square_causal: bool = False  # its causal mask is taken only where S_q = S_k


# -- how each is called -----------------------------------------------------------------------------------------------


def _function(module: str, name: str, package: str) -> Callable:
    """A function of a library. Raises MissingTool where the library is not installed."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise MissingTool(f"{module} cannot be imported ({error}): pip install {package}") from error


def _fa3(workload: Workload) -> Attend:
    """e4m3 tensors are unscaled: descales of one, (batch, kv heads) as its interface wants them, made beforehand."""
    call = _function("fa3_fwd_interface", "flash_attn_func", "fa3-fwd")
    scales = {}
    if workload.dtype == "e4m3":
        import torch

        one = torch.ones((workload.batch, workload.kv_heads), device=_device(), dtype=torch.float32)
        scales = {f"{name}_descale": one for name in "qkv"}
    return lambda q, k, v: call(q, k, v, causal=workload.causal, **scales)


def _fa4(workload: Workload) -> Attend:
    call = _function("flash_attn.cute", "flash_attn_func", "flash-attn-4")
    return lambda q, k, v: call(q, k, v, causal=workload.causal)


def _fa4_gradient(workload: Workload) -> Gradient:
    """What its autograd function calls, without autograd."""
    forward, backward = (_function("flash_attn.cute.interface", f"_flash_attn_{way}", "flash-attn-4") for way in ("fwd", "bwd"))

    def ready(q, k, v, do):
        o, lse = forward(q, k, v, causal=workload.causal, return_lse=True)[:2]
        return lambda: backward(q, k, v, o, do, lse, causal=workload.causal)[:3]

    return ready


def _fa4_tile(workload: Workload) -> Tile:
    """By its own table."""
    table = _function("flash_attn.cute.interface", "_tile_size_bwd_sm90", "flash-attn-4")
    found = table(workload.head_dim, workload.head_dim, workload.causal, False)
    return Tile(found.m_block_size, found.n_block_size, found.num_stages_Q, found.num_wg)


def cudnn(workload: Workload) -> Attend:
    """cuDNN as PyTorch calls it, LSE kept, as for training."""
    import torch

    kernel = torch.ops.aten._scaled_dot_product_cudnn_attention
    return lambda q, k, v: kernel(*_by_head(q, k, v), None, True, 0.0, workload.causal)[0].transpose(1, 2)


def fa2(workload: Workload) -> Attend:
    """FlashAttention-2 as PyTorch ships it."""
    import torch

    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    return lambda q, k, v: kernel(*_by_head(q, k, v), 0.0, workload.causal)[0].transpose(1, 2)


def cudnn_gradient(workload: Workload) -> Gradient:
    """cuDNN's backward as PyTorch's autograd calls it."""
    import torch

    forward = torch.ops.aten._scaled_dot_product_cudnn_attention
    backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward

    def ready(q, k, v, do):
        q, k, v, do = _by_head(q, k, v, do)
        o, lse, of_q, of_k, most_q, most_k, seed, offset, _ = forward(q, k, v, None, True, 0.0, workload.causal)
        rest = (lse, seed, offset, None, of_q, of_k, most_q, most_k, 0.0, workload.causal)
        return lambda: _by_head(*backward(do, q, k, v, o, *rest))

    return ready


def fa2_gradient(workload: Workload) -> Gradient:
    """FlashAttention-2's backward as PyTorch's autograd calls it."""
    import torch

    forward = torch.ops.aten._scaled_dot_product_flash_attention
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward

    def ready(q, k, v, do):
        q, k, v, do = _by_head(q, k, v, do)
        o, lse, of_q, of_k, most_q, most_k, seed, offset, _ = forward(q, k, v, 0.0, workload.causal)
        rest = (lse, of_q, of_k, most_q, most_k, 0.0, workload.causal, seed, offset)
        return lambda: _by_head(*backward(do, q, k, v, o, *rest))

    return ready


def _flex(workload: Workload) -> Attend:
    """FlexAttention, compiled for one shape by the defaults of torch.compile."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask, shift = None, workload.seqlen_k - workload.seqlen_q
    if workload.causal:
        mask = create_block_mask(
            lambda b, h, i, j: i + shift >= j, None, None, workload.seqlen_q, workload.seqlen_k, device=_device()
        )
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = workload.heads_per_kv > 1
    return lambda q, k, v: compiled(*_by_head(q, k, v), block_mask=mask, enable_gqa=grouped).transpose(1, 2)


def _by_head(*tensors) -> tuple:
    return tuple(x.transpose(1, 2) for x in tensors)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


PEERS = {
    "fa3": Peer(
        title="FlashAttention-3",
        package="fa3-fwd",
        files=("_C.abi3.so", "fa3_fwd_interface.py"),
        attention="FlashAttnFwdSm90",
        prepare=_fa3,
        dtypes=("bf16", "e4m3"),  # the wheel is built without fp16
    ),
    "fa4": Peer(
        title="FlashAttention-4 for Hopper",
        package="flash-attn-4",
        files=("cute/interface.py", "cute/flash_fwd_sm90.py"),
        attention="FlashAttentionForwardSm90",
        prepare=_fa4,
        differentiate=_fa4_gradient,
        backward_files=("cute/interface.py", *(f"cute/flash_bwd_{part}.py" for part in ("sm90", "preprocess", "postprocess"))),
        backward_tile=_fa4_tile,
        beside=("nvidia-cutlass-dsl", "quack-kernels"),
    ),
    "cudnn": Peer(
        title="cuDNN",
        package="torch",
        files=("libtorch_cuda.so",),
        attention="sdpa",
        prepare=cudnn,
        differentiate=cudnn_gradient,
        beside=("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"),
        square_causal=True,  # PyTorch's alignment there is top left
    ),
    "fa2": Peer(
        title="FlashAttention-2",
        package="torch",
        files=("libtorch_cuda.so",),
        attention="flash_fwd",
        prepare=fa2,
        differentiate=fa2_gradient,
    ),
    "flex": Peer(
        title="FlexAttention",
        package="torch",
        files=("attention/flex_attention.py",),
        attention="flex_attention",
        prepare=_flex,
        beside=("triton",),
    ),
}
NAMES = tuple(f"{PREFIX}{name}" for name in PEERS)


def is_peer(kernel: str) -> bool:
    """Whether a kernel is asked for by such a name."""
    return kernel.startswith(PREFIX)


def library_of(kernel: str) -> str:
    """The distribution that a peer comes with; "" for every other kernel."""
    return find(kernel).package if is_peer(kernel) else ""


def find(kernel: str) -> Peer:
    """The peer of that name. Raises UsageError naming those there are."""
    name = kernel.removeprefix(PREFIX)
    if name not in PEERS:
        raise UsageError(f"no peer is called {kernel!r} ({', '.join(NAMES)}){did_you_mean(kernel, NAMES)}")
    return PEERS[name]


def subject_of(kernel: str) -> Subject:
    """The peer as a kernel that can be asked; what it is not asked for, it need not refuse. Raises UsageError as `find` does."""
    peer = find(kernel)
    library = resolve("torch-fa2").refuses if peer.package == "torch" else lambda case: None

    def forward(q, k, v, *, causal=False, softmax_scale=None):
        raise NotImplementedError("a peer is prepared for one workload before it is called")

    def refuses(case) -> str | None:
        if peer.square_causal and case.causal and case.seqlen_q != case.seqlen_k:
            return "its causal mask is aligned top left where the lengths differ"
        return library(case)

    return Subject(
        name=kernel, forward=forward, head_dims=peer.head_dims, dtypes=peer.dtypes, needs_cuda=True, strict=False, refuses=refuses
    )


def prepare(kernel: str, workload: Workload) -> Attend:
    """f(q, k, v) -> O or (O, LSE) for one workload. Raises MissingTool where the library is not installed."""
    return find(kernel).prepare(workload)


def differentiate(kernel: str, workload: Workload) -> Gradient:
    """The backward for one workload. Raises UsageError where it has none here, MissingTool where the library is not installed."""
    peer = find(kernel)
    if peer.differentiate is None:
        able = ", ".join(f"{PREFIX}{name}" for name, each in PEERS.items() if each.differentiate)
        raise UsageError(f"no backward of {kernel} is asked for here ({able})")
    return peer.differentiate(workload)


# -- what was run -----------------------------------------------------------------------------------------------------


def packages_of(kernel: str) -> dict[str, str]:
    """The library and what decides beside it -> version, as far as installed."""
    peer = find(kernel)
    found = {}
    for name in (peer.package, *peer.beside):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def sources_of(kernel: str, backward: bool = False) -> dict[str, str]:
    """Path within the library's distribution -> SHA-256 of the files that hold the kernel; empty where it is not installed."""
    peer = find(kernel)
    files = (backward and peer.backward_files) or peer.files
    try:
        listed = metadata.distribution(peer.package).files or ()
    except metadata.PackageNotFoundError:
        return {}
    found = {}
    for path in listed:
        if path.as_posix().endswith(files) and (digest := _sha256(Path(path.locate()))):
            found[path.as_posix()] = digest
    return found


@cache
def _sha256(path: Path) -> str | None:
    """Of a file, which may have a gigabyte; its package's record may say another. None where it is not there."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def with_counters(run: Run, kernels: Sequence[Profiled]) -> Run:
    """A measured run of a peer with what was counted of its attention kernel; all that the call launched stay named.

    A backward is several kernels wherever it comes from: all are counted, as of ours.
    """
    if run.workload.backward:
        tile = tile_of(nsight.main_of(kernels).name) or find(run.schedule).backward_tile(run.workload)
        return nsight.with_counters(replace(run, tile=tile), _shortened(kernels))
    attention = attention_of(run.schedule, kernels)
    tile = tile_of(attention.name)
    counted = nsight.with_counters(replace(run, tile=tile), [attention])
    named = tuple((each.name, each.metrics.get(nsight.CYCLES)) for each in _shortened(_first(attention, kernels)))
    return replace(counted, measurement=replace(counted.measurement, kernels=named))


def attention_of(kernel: str, kernels: Sequence[Profiled]) -> Profiled:
    """The attention among the kernels of one call: by its name, or the longest."""
    part = find(kernel).attention
    return max([each for each in kernels if part in each.name] or kernels, key=lambda each: each.metrics.get(nsight.CYCLES, 0.0))


def _shortened(kernels: Sequence[Profiled]) -> list[Profiled]:
    return [replace(each, name=each.name[:LONGEST_NAME]) for each in kernels]


def _first(one: Profiled, kernels: Sequence[Profiled]) -> list[Profiled]:
    return [one, *(each for each in kernels if each is not one)]


_SM90 = re.compile(r"CollectiveMainloopFwdSm90<(\d+),tuple<C<(\d+)>,C<\d+>,C<\d+>>,tuple<C<(\d+)>,C<(\d+)>,C<\d+>>")
"""FlashAttention-3: stages, cluster, tile of queries x keys x head dim."""
_MMA = re.compile(r"[Ff]lash_fwd_kernel_traits<\d+,(\d+),(\d+),(\d+)")
"""FlashAttention-2: head dim, queries, keys, warps."""
_MMA_BACKWARD = re.compile(r"[Ff]lash_bwd_kernel_traits<\d+,(\d+),(\d+),(\d+),\d+,\d+,\d+,\w+,(\w+)")
"""Its backward: head dim, queries, keys, warps, three atoms, whether V is in registers, whether Q has one buffer, not two."""

_CUDNN_BACKWARD = re.compile(r"sm90_flash_bprop_wgmma_f16_knob_\d+_64x64x(\d+)_1x4x1_")
"""cuDNN's: queries and keys of a warpgroup, head dim. Two warpgroups share 128 keys, and Q and dO have so many buffers as
its machine code counts: 3 at d128, 5 at d64. At d256 a CTA has half of the head dim, which is no tile of ours."""
_CUDNN_STAGES = {64: 5, 128: 3}


def tile_of(name: str) -> Tile | None:
    """The tile that a kernel's name tells, as Nsight Compute prints it; None where it tells none."""
    plain = re.sub(r"\((?:int|bool)\)|cute::|flash::|\s", "", name)
    if found := _SM90.search(plain):
        stages, cluster, rows, keys = map(int, found.groups())
        return Tile(rows, keys, stages, max(1, rows // 64), cluster)
    if found := _MMA.search(plain):
        rows, keys, warps = map(int, found.groups())
        return Tile(rows, keys, 1, max(1, warps // 4))
    if found := _MMA_BACKWARD.search(plain):
        *sizes, single = found.groups()
        rows, keys, warps = map(int, sizes)
        return Tile(rows, keys, 1 if single in ("1", "true") else 2, max(1, warps // 4))
    if (found := _CUDNN_BACKWARD.search(plain)) and int(found[1]) in _CUDNN_STAGES:
        return Tile(64, 128, _CUDNN_STAGES[int(found[1])], 2)
    return None
