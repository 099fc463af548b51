"""Calling somebody's kernel: what it raises is a refusal or a fault and never ours, and what it changes is put back.

A *refusal* is a limit that the kernel states about its arguments. It is not applicable, and no failure:

- NotImplementedError, whatever it says;
- ValueError, TypeError or AssertionError out of a `raise` or `assert` statement of the kernel's own Python code (out of
  PyTorch, Triton, NumPy or the standard library it is an accident, such as an index of the wrong type);
- RuntimeError that speaks of what is supported, as the checks of a C++ extension do.

The last two only if the very same shapes, strides and dtype are refused again with other values: a limit depends on what
can be known before anything is computed. Everything else, SystemExit included, is a fault. For a kernel that promises
what it is asked (`Subject.strict`) only NotImplementedError refuses.
"""

from __future__ import annotations

import dis
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch

from . import state
from .check import Fault, Skipped

_STATED = re.compile(r"support|not implemented|multiple of|divisible by|at most", re.IGNORECASE)
_REPEATS = 2


@contextmanager
def contained() -> Iterator[list[str]]:
    """Within, a subject runs; afterwards what it changed of the process is as it was, and named in the list (`state`)."""
    before, changed = state.read(), []
    try:
        yield changed
    finally:
        changed += state.put_back(before)


def settle(error: BaseException, again: Callable[[], object], strict: bool, doing: str = "") -> NoReturn:
    """Raise Skipped where `error` is a refusal, Fault where it is not; `again` repeats the call with other values.

    `doing` stands before "raised", such as "backward ".
    """
    what = f"{doing}raised {said(error)}"
    if isinstance(error, NotImplementedError):
        raise Skipped(f"{doing}not supported: {_first_line(error)}" if _text(error) else f"{doing}not supported") from None
    if strict or not states_a_limit(error):
        raise Fault(what) from None
    for _ in range(_REPEATS):
        try:
            with contained():
                again()
        except KeyboardInterrupt:
            raise
        except BaseException as other:
            if type(other) is type(error):
                continue
            raise Fault(f"{what}, and on the same shapes with other values {said(other)}") from None
        raise Fault(f"{what}, but not on the same shapes with other values") from None
    raise Skipped(f"refused: {what}") from None


def states_a_limit(error: BaseException) -> bool:
    """Whether `error` reads as a limit of the kernel, by its type and where it was raised."""
    if isinstance(error, (RecursionError, torch.OutOfMemoryError)) or "CUDA error" in _text(error):
        return False
    if isinstance(error, RuntimeError):
        return bool(_STATED.search(_text(error)))
    return isinstance(error, (ValueError, TypeError, AssertionError)) and _raised_by_the_kernel(error)


def _raised_by_the_kernel(error: BaseException) -> bool:
    """Whether a `raise` or `assert` statement outside of the libraries raised it."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None or place.tb_lasti < 0:
        return False
    room = str(place.tb_frame.f_globals.get("__name__")).partition(".")[0]
    if room in {"torch", "triton", "numpy"} | sys.stdlib_module_names:
        return False
    return place.tb_frame.f_code.co_code[place.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def refill(*tensors: torch.Tensor) -> None:
    """Other values, N(0, 1), in the same memory; tensors whose elements share memory keep theirs."""
    for x in tensors:
        try:
            with torch.no_grad():
                x.normal_()
        except RuntimeError:
            continue


def plain(got: object) -> object:
    """A strided tensor as PyTorch's own class, usable by autograd; everything else as it is."""
    with torch._C.DisableTorchFunctionSubclass():  # a subclass may refuse whatever it is asked
        if isinstance(got, torch.Tensor) and got.layout == torch.strided and not got.is_quantized:
            got = got if type(got) in (torch.Tensor, torch.nn.Parameter) else got.as_subclass(torch.Tensor)
            return got.clone() if got.is_inference() else got.resolve_neg()
        return got


def said(error: BaseException) -> str:
    """Its type and the first line of its message."""
    return f"{type(error).__name__}: {_first_line(error)}"


def place(error: BaseException) -> str:
    """Where in this package it was raised, such as "memory._hold_unchanged"."""
    names = ["the suite"]
    trace = error.__traceback__
    while trace is not None:
        room = str(trace.tb_frame.f_globals.get("__name__"))
        if room.startswith(__package__):
            names.append(f"{room.rpartition('.')[2]}.{trace.tb_frame.f_code.co_name}")
        trace = trace.tb_next
    return names[-1]


def _first_line(error: BaseException) -> str:
    lines = _text(error).splitlines()
    return lines[0] if lines else "(no message)"


def _text(error: BaseException) -> str:
    try:
        return str(error).strip()
    except Exception:  # an exception of the subject's own class may fail to describe itself
        return ""
