"""Compiled functions: numba's compiler with a cache on disk that may cost time, never the answer; and loops that can be stopped.

A cache that cannot be written, or that is damaged, is a reason to compile again and no more. numba itself would raise at
import in the first case and at every call in the second, and it would run compiled code whose bytes have changed.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable

import numba
from numba.core import caching
from numba.core.registry import CPUDispatcher

SLICE = 150_000
"""Events that compiled code replays before it returns for a moment: some 30 ms, so that an interrupt is heard."""
_DIGEST_BYTES = hashlib.sha256().digest_size


class CacheWarning(UserWarning):
    """The compiled replay cannot be kept; every start compiles it anew."""


class _Files(caching.IndexDataCacheFile):
    """numba's cache files, each followed by its checksum (which unpickling does not read)."""

    def _dump(self, obj: object) -> bytes:
        data = super()._dump(obj)
        return data + hashlib.sha256(data).digest()

    def _load_data(self, name: str) -> object:
        with open(self._data_path(name), "rb") as file:
            data = file.read()
        if hashlib.sha256(data[:-_DIGEST_BYTES]).digest() != data[-_DIGEST_BYTES:]:
            raise ValueError(f"{name} is damaged")
        return super()._load_data(name)


class _Cache(caching.FunctionCache):
    """numba's cache of one function, whose failures are no one's concern but the clock's."""

    def __init__(self, function: Callable):
        super().__init__(function)
        self._cache_file.__class__ = _Files

    def load_overload(self, sig: object, target_context: object) -> object:
        """The compiled function, or None where there is none, or none that is whole."""
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # whatever unpickling half a file raises
            self._forget()
            return None

    def save_overload(self, sig: object, data: object) -> None:
        """Keep a compiled function, where that is possible."""
        try:
            super().save_overload(sig, data)
        except Exception:  # the disk is full, the folder has gone, the index is damaged
            self._forget()
            _cannot_keep()

    def _forget(self) -> None:
        try:
            self.flush()
        except OSError:
            self.disable()


# What is compiled here must not allocate: without reference counts, which are atomic, loops over arrays are eight times faster.
_OPTIONS = {"_nrt": False, "error_model": "numpy"}


class _Part(CPUDispatcher):
    """Only compiled code calls it: the machine code that Python would need to call it is not made."""

    def __call__(self, *_: object, **__: object) -> object:
        raise TypeError(f"{self.py_func.__name__} is a part of a compiled function, which Python cannot call")


def inlined(function: Callable) -> Callable:
    """Decorator: a part of a compiled function, put into it by LLVM; only the whole is kept on disk, and only it can be called.

    Without wrappers for Python and for C, which no one calls, the first replay of an installation compiles a third less long.
    """
    part = numba.njit(forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, **_OPTIONS)(function)
    if part is not function:  # NUMBA_DISABLE_JIT
        part.__class__ = _Part
    return part


def compiled() -> Callable[[Callable], Callable]:
    """Decorator: a function compiled by numba, kept on disk between processes where a folder for it can be written.

    It must not allocate. Warns with a CacheWarning, once, where there is no folder.
    """

    def decorate(function: Callable) -> Callable:
        dispatcher = numba.njit(**_OPTIONS)(function)
        if dispatcher is function:  # NUMBA_DISABLE_JIT
            return function
        try:
            dispatcher._cache = _Cache(function)
        except Exception:  # numba found no folder it may write, or its classes are not what they were
            _cannot_keep()
        return dispatcher

    return decorate


_told: list[bool] = []


def _cannot_keep() -> None:
    if not _told:
        _told.append(True)
        warnings.warn(
            "the compiled replay cannot be kept, so every start compiles it anew, some 12 seconds;"
            " set NUMBA_CACHE_DIR to a folder that can be written",
            CacheWarning,
            stacklevel=2,
        )
