"""Who is held to the suite: our kernels by schedule, PyTorch's attention backends, and the user's own callable."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ...simulator.errors import UsageError, did_you_mean
from ..cuda import config as cuda
from ..cuda.backward import config as backward
from ..cuda.pairs import config as pairs
from ..gluon import config as gluon
from .check import Case, HeadDim, MissingTool
from .layouts import HEAD_DIM_STRIDED

OURS = ("standard", "fa1", "fa2", *cuda.SCHEDULES, *pairs.NAMES, *gluon.NAMES)
"""Schedules with a kernel of their own behind `kernels.ops.flash_attn_func`."""
_SAME_BITS = "-deterministic"
GRADIENTS = tuple(f"{schedule}-backward{how}" for schedule in backward.SCHEDULES for how in ("", _SAME_BITS))
"""CUDA backwards, each behind the forward that "auto" takes, in their two modes."""

HALF = ("fp16", "bf16")
CALLABLE = "f(q, k, v, causal=..., softmax_scale=...) -> O or (O, LSE)"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A kernel and what it promises.

    `forward(q, k, v, causal=, softmax_scale=)` takes (B, S, H, D) tensors and returns O or (O, LSE, ...), LSE (B, H, Sq)
    fp32, natural logarithm, or None. What it raises is a fault where the kernel is `strict` about what it promises, and may
    be a refusal where it is not (`calls`). `tile` is the length whose neighbours the shapes probe. `differentiable` is None
    where gradients are checked only if O carries one. `dq_is_deterministic` False documents atomics in dQ. `refuses(case)`
    gives the reason why a case lies outside the promise, or None; raising NotImplementedError in the call says the same.
    `arguments` are those it is called with besides, `package` the installed one it is from, with its version. A `slow`
    kernel, such as plain torch tile by tile, is asked for a few tiles at most, on a GPU too. `sources` are the files that
    hold the kernel.
    """

    name: str
    forward: Callable
    head_dims: tuple[HeadDim, ...] = (HeadDim(64), HeadDim(128))
    tile: int = 128
    dtypes: tuple[str, ...] = ("fp16", "bf16", "fp32", "fp64")
    needs_cuda: bool = False
    slow: bool = False
    strict: bool = True
    returns_lse: bool | None = None
    differentiable: bool | None = None
    dq_is_deterministic: bool = True
    refuses: Callable[[Case], str | None] = lambda case: None
    arguments: tuple[str, ...] = ()
    package: str | None = None
    sources: tuple[Path, ...] = ()

    @property
    def source_sha256(self) -> str | None:
        """Hash of the files that hold the kernel; None where they are not known."""
        if not self.sources:
            return None
        return hashlib.sha256(b"".join(path.read_bytes() for path in self.sources)).hexdigest()


def names() -> tuple[str, ...]:
    """Every subject that has a name."""
    return (*OURS, *GRADIENTS, *_TORCH)


def look_up(name: str) -> None:
    """Raise UsageError where `name` is no subject's and no `package.module:function` either; needs no torch."""
    if name not in names() and ":" not in name:
        raise UsageError(
            f"no kernel is called {name!r}: give one of {', '.join(names())}, or your own as package.module:function"
            f"{did_you_mean(name, names())}"
        )


def resolve(name: str, device: str = "cuda", arguments: Sequence[str] = ()) -> Subject:
    """The subject called `name`, or the user's `package.module:function`, called with `arguments` such as "deterministic=True".

    Our kernels for "cpu" are those of Triton's interpreter, with the small tiles they have there. Raises UsageError for
    a name that is none, MissingTool where a library is missing, one sentence each.
    """
    look_up(name)
    if arguments and ":" not in name:
        raise UsageError(f"--with is for your own package.module:function; {name} takes no other arguments")
    if name in OURS:
        return _ours(name, device)
    if name in GRADIENTS:
        return _gradients(name)
    if name in _TORCH:
        return _TORCH[name]()
    keywords = dict(map(parse_argument, arguments))
    found = load(name, keywords)
    return Subject(
        name=name,
        forward=functools.partial(found, **keywords) if keywords else found,
        strict=False,
        arguments=tuple(arguments),
        package=package_of(name),
        sources=source_of(name),
    )


def head_dim(text: str | int) -> HeadDim:
    """A head dim from 128 or "128", or from "192x128" where V's is another; raises UsageError for what is none."""
    parts = str(text).split("x")
    if len(parts) > 2 or not all(re.fullmatch("[1-9][0-9]{0,3}", part) for part in parts):
        raise UsageError(
            f"--head-dim {text!r} is none: give a whole number below 10000, or 192x128 where V's differs from Q's and K's"
        )
    return HeadDim(*map(int, parts))


def source_of(name: str) -> tuple[Path, ...]:
    """The file of the module in `package.module:function`, where it has one."""
    file = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
    return (Path(file),) if isinstance(file, str) and Path(file).is_file() else ()


def package_of(name: str) -> str | None:
    """ "flash-attn-4 4.0.0" for "flash_attn.cute:flash_attn_func"; None for a module of no installed package."""
    top = name.partition(":")[0].partition(".")[0]
    try:
        found = metadata.packages_distributions().get(top, [])
        return ", ".join(f"{name} {metadata.version(name)}" for name in dict.fromkeys(found)) or None
    except Exception:  # broken metadata of some other package is no reason not to validate this one
        return None


def parse_argument(text: str) -> tuple[str, object]:
    """A name and a value from "deterministic=True"; raises UsageError where it is not a Python literal."""
    name, _, value = text.partition("=")
    try:
        if name.isidentifier():
            return name, ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    raise UsageError(f"--with {text!r} is no argument: give NAME=VALUE with a Python literal, such as deterministic=True")


def load(name: str, keywords: dict[str, object], contract: str = CALLABLE) -> Callable:
    """Import `package.module:function`, the working directory included, and see that it takes the arguments."""
    module_name, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a module does on import, the user wants to read it in one sentence
        raise UsageError(f"cannot import {module_name!r}: {type(error).__name__}: {error}") from error
    found = module
    try:
        for part in attribute.split("."):
            found = getattr(found, part, None)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module may compute its attributes
        raise UsageError(f"{name} cannot be had: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise UsageError(f"{module_name!r} has no callable {attribute!r}: write package.module:function")
    try:
        inspect.signature(found).bind(None, None, None, causal=False, softmax_scale=None, **keywords)
    except TypeError as error:
        raise UsageError(f"{name} does not take the arguments ({error}): it must be {contract}") from error
    except Exception:  # built-ins may have no signature, and a class of the user's may compute its own
        pass
    return found


# -- ours -------------------------------------------------------------------------------------------------------------


def _ours(schedule: str, device: str) -> Subject:
    """`flash_attn_func` of one schedule."""
    if importlib.util.find_spec("triton") is None:
        raise MissingTool(f"the kernel {schedule!r} needs triton, which is not installed: pip install 'fasim[kernels]' on Linux")
    on_hopper = schedule in (*cuda.SCHEDULES, *pairs.NAMES, *gluon.NAMES)  # its backward is Triton's all the same
    if device == "cpu" and not on_hopper:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    try:
        from ..ops import flash_attn_func
    except ImportError as error:
        raise MissingTool(f"the kernel {schedule!r} cannot be loaded: {error}") from error

    def forward(q, k, v, *, causal=False, softmax_scale=None):
        return flash_attn_func(q, k, v, softmax_scale=softmax_scale, causal=causal, schedule=schedule, return_lse=True)

    rooms = Path(__file__).parents[1]
    own = sorted((rooms / "triton").glob("*.py"))
    if schedule in gluon.NAMES:
        own = gluon.sources_of(schedule.removeprefix(gluon.PREFIX))
    elif on_hopper:
        room = rooms / "cuda"
        text = cuda.path_of(schedule.removeprefix(pairs.PREFIX))
        own = [room / "launch.py", room / "wgmma.py", text, *sorted(room.glob("*.cuh"))]
        own += sorted(pairs.HERE.glob("*.py")) if schedule in pairs.NAMES else []
    return Subject(
        name=schedule,
        forward=forward,
        head_dims=(pairs.HEAD_DIM,) if schedule in pairs.NAMES else (64, 128, 256),
        tile=128 if device == "cuda" or on_hopper else 16,
        dtypes=HALF,
        needs_cuda=device == "cuda" or on_hopper,
        returns_lse=True,
        differentiable=True,
        dq_is_deterministic=device != "cuda",  # asked for neither way: on Hopper a CUDA backward adds dQ in any order
        sources=(rooms / "ops.py", rooms / "arguments.py", *own),
    )


def _gradients(name: str) -> Subject:
    """`flash_attn_func` with a CUDA backward."""
    try:
        from ..backward import head_dims
        from ..ops import flash_attn_func
    except ImportError as error:
        raise MissingTool(f"the kernel {name!r} cannot be loaded: {error}") from error
    schedule, deterministic = name.removesuffix(_SAME_BITS).removesuffix("-backward"), name.endswith(_SAME_BITS)

    def forward(q, k, v, *, causal=False, softmax_scale=None):
        return flash_attn_func(q, k, v, softmax_scale, causal, return_lse=True, deterministic=deterministic, backward=schedule)

    room, rooms = backward.HERE, Path(__file__).parents[1]
    others = {each.replace("-", "_") for each in backward.SCHEDULES if each != schedule}
    own = [path for path in sorted(room.glob("*.cu*")) if path.stem not in others]
    own += [room / f"{part}.py" for part in ("launch", "config", "wgmma")]
    return Subject(
        name=name,
        forward=forward,
        head_dims=tuple(map(HeadDim, head_dims(schedule))),
        dtypes=HALF,
        needs_cuda=True,
        returns_lse=True,
        differentiable=True,
        dq_is_deterministic=deterministic,
        sources=(rooms / "ops.py", rooms / "arguments.py", rooms / "backward.py", *own),
    )


# -- PyTorch's backends -----------------------------------------------------------------------------------------------


def _math() -> Subject:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def forward(q, k, v, *, causal=False, softmax_scale=None):
        mask = None
        if causal:
            seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
            mask = seen.tril(k.shape[1] - q.shape[1])
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.MATH):
            out = torch.nn.functional.scaled_dot_product_attention(
                *heads_first, attn_mask=mask, scale=softmax_scale, enable_gqa=q.shape[2] != k.shape[2]
            )
        return out.transpose(1, 2)

    return Subject(name="torch-math", forward=forward, returns_lse=False, differentiable=True)


def _fa2() -> Subject:
    import torch

    def forward(q, k, v, *, causal=False, softmax_scale=None):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*heads_first, 0.0, causal, scale=softmax_scale)
        return out.transpose(1, 2), lse.masked_fill(lse == float("inf"), float("-inf"))  # FA2 marks an empty row with +inf

    return Subject(
        name="torch-fa2",
        forward=forward,
        head_dims=(64, 128, 256),
        dtypes=HALF,
        needs_cuda=True,
        returns_lse=True,
        differentiable=True,
        dq_is_deterministic=False,
        refuses=_pytorch_refuses,
    )


def _cudnn() -> Subject:
    import torch

    def forward(q, k, v, *, causal=False, softmax_scale=None):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *heads_first, None, True, 0.0, causal, scale=softmax_scale
        )
        return out.transpose(1, 2), lse.reshape(q.shape[0], q.shape[2], q.shape[1])

    def refuses(case: Case) -> str | None:
        if case.causal and case.seqlen_q != case.seqlen_k:
            return "PyTorch aligns cuDNN's causal mask top left and dispatches to it only where Sq = Sk"
        return _pytorch_refuses(case)

    return Subject(
        name="torch-cudnn",
        forward=forward,
        head_dims=(64, 128),
        dtypes=HALF,
        needs_cuda=True,
        returns_lse=True,
        differentiable=True,
        dq_is_deterministic=False,
        refuses=refuses,
    )


def _pytorch_refuses(case: Case) -> str | None:
    if case.layout in HEAD_DIM_STRIDED:
        return "PyTorch dispatches to it only where the head dim is contiguous"
    if 0 in (case.batch, case.seqlen_q, case.seqlen_k, case.heads):
        return "PyTorch dispatches empty tensors to math attention"
    return None


_TORCH = {"torch-cudnn": _cudnn, "torch-fa2": _fa2, "torch-math": _math}
