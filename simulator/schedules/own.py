"""A schedule from the user's own file, asked for as ./mine.py:my_schedule. The file is Python and is run as such.

Whatever is wrong with it is one sentence that begins with file and line. A function that does not end is stopped: after
as many instructions, or as much time, as no schedule of that loop needs. The recorder counts the instructions. Time is the
processor's, so that a busy machine changes nothing, and is kept by another thread, which Python lets interrupt any of its own
code between two steps; a call that never returns to Python (a sleep without end, a native library) is not stopped, and neither
is code that catches every exception and goes on.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import inspect
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from ..errors import EndlessError, UsageError, did_you_mean
from ..values import shown

MAX_BYTES = 1_000_000
"""Of a schedule's file."""
SECONDS, SECONDS_A_STEP = 5.0, 0.02
"""Of the processor, before a recording is stopped: some thousand times what three blocks take, and fifty times what a further
one takes."""
ASLEEP = 20
"""Times as long by the clock on the wall, before a recording that does nothing is stopped."""
INSTRUCTIONS, INSTRUCTIONS_A_STEP = 20_000, 2_000
"""The same in instructions; ours record at most a hundred a step."""
_LOOK, _AGAIN = 0.02, 0.5
"""Seconds between two looks at a recording, and before what was not heard is sent again."""


class _Stopped(BaseException):
    """Raised in the middle of the user's code."""


def is_own(name: str) -> bool:
    """Whether a schedule's name asks for a file: ./mine.py:my_schedule."""
    return ".py:" in name or name.endswith(".py")


def shown_path(path: Path) -> str:
    """A path as it is asked for on a command line."""
    return str(path) if path.is_absolute() or path.parts[:1] == ("..",) else f"./{path}"


def load(name: str) -> tuple[Callable, str]:
    """The function of a name such as ./mine.py:my_schedule, guarded, and where it stands as "file:line".

    Raises UsageError where the file cannot be read or run, or has no such function of (cta, tile).
    """
    file, _, function = name.rpartition(":") if not name.endswith(".py") else (name, "", "")
    path = Path(file)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{file} has more than {MAX_BYTES:,} bytes, and a schedule is a few lines")
        source = path.read_bytes()
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the schedule's file {file}: {getattr(error, 'strerror', None) or error}") from None
    return _function(file, hashlib.sha256(source).hexdigest(), source, function)


@functools.lru_cache(maxsize=16)
def _function(file: str, _digest: str, source: bytes, name: str) -> tuple[Callable, str]:
    """Once for each content of the file, so that what is recorded of it is kept as long as it stays the same."""
    module = _run(file, source)
    functions = {
        key: value for key, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__
    }
    there = ", ".join(functions) or "none"
    if not name:
        raise UsageError(f"{file} names no function: give one of its functions ({there}), as {file}:my_schedule")
    if name not in vars(module):
        raise UsageError(f"{file} has no function {shown(name)} ({there}){did_you_mean(name, functions)}")
    body = getattr(module, name)
    if not inspect.isfunction(body) or inspect.isgeneratorfunction(body) or inspect.iscoroutinefunction(body):
        raise UsageError(f"{file}: {name!r} is not a plain function but {_kind(body)}; a schedule is def {name}(cta, tile): ..")
    where = f"{file}:{body.__code__.co_firstlineno}"
    try:
        inspect.signature(body).bind(None, None)
    except TypeError:
        raise UsageError(f"{where}: {name}{inspect.signature(body)} cannot be called with (cta, tile), as a schedule is") from None
    return _guarded(body, file, name, where), where


def _kind(found: object) -> str:
    if inspect.isgeneratorfunction(found):
        return "a generator"
    return "a coroutine" if inspect.iscoroutinefunction(found) else f"a {type(found).__name__}"


def _run(file: str, source: bytes) -> types.ModuleType:
    """The file as a module, under a name of its own; imports beside it are found."""
    module = types.ModuleType(f"schedule_{Path(file).stem}")
    module.__file__ = file
    folder = str(Path(file).resolve().parent)
    try:
        code = compile(source, file, "exec")
    except SyntaxError as error:
        raise UsageError(f"{file}:{error.lineno or 1}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise UsageError(f"{file} is not Python: {error}") from None
    sys.path.insert(0, folder)
    try:
        with _blamed(file, "the file"), _stopping(SECONDS), redirect_stdout(sys.stderr):
            exec(code, vars(module))
    finally:
        sys.path.remove(folder)
    return module


def _guarded(body: Callable, file: str, name: str, where: str) -> Callable:
    """The function with its faults in sentences, and an end."""

    @functools.wraps(body)
    def record(cta, tile) -> None:
        steps = max(1, len(tile.kv_blocks)) * max(1, len(tile.q_blocks(0)))
        cta.most_ops = max((len(warp.ops) for warp in cta.warps), default=0) + INSTRUCTIONS + INSTRUCTIONS_A_STEP * steps
        with _blamed(file, name), _stopping(SECONDS + SECONDS_A_STEP * steps), redirect_stdout(sys.stderr):
            body(cta, tile)
        if not any(warp.rank >= 0 for warp in cta.warps):
            raise UsageError(f"{where}: {name} has no consumers that do anything: speak verbs to each of cta.consumers()")
        for ring in cta.rings.values():
            if type(ring.nbytes) is not int or not 0 < ring.nbytes < 2**30:
                raise UsageError(
                    f"{where}: {name} makes a ring {ring.name} of {shown(ring.nbytes)} bytes, which no SM has room for"
                )

    return record


# -- faults ---------------------------------------------------------------------------------------------------------------


@contextmanager
def _blamed(file: str, name: str) -> Iterator[None]:
    """Every fault as a sentence that begins with the line of the user's file where it happened."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        line = _line(error, file)
        raise UsageError(f"{file}{f':{line}' if line else ''}: {_sentence(error, name)}") from None


def _line(error: BaseException, file: str) -> int | None:
    """The innermost line of the user's own file."""
    found, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            found = trace.tb_lineno
        trace = trace.tb_next
    return found


def _sentence(error: BaseException, name: str) -> str:
    if isinstance(error, _Stopped | EndlessError):
        return f"{name} does not end: it was stopped after {error}; look for a loop that does not"
    if isinstance(error, UsageError):
        return str(error)
    if isinstance(error, AttributeError) and type(error.obj).__name__ in ("Warp", "Cta"):
        who = "a warp" if type(error.obj).__name__ == "Warp" else "cta"
        verbs = [key for key, value in inspect.getmembers(type(error.obj), callable) if not key.startswith("_")]
        return f"{who} has no verb {error.name!r} ({', '.join(verbs)}){did_you_mean(error.name, verbs)}"
    if isinstance(error, NameError) and error.name:
        return f'{error.name!r} is not defined; a ring is made before it is used, as K = cta.ring("K", tile.k_bytes, tile.stages)'
    return f"{name} raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def _stopping(seconds: float) -> Iterator[None]:
    """Interrupt this thread's Python code once the process has worked for that long, or slept for much longer.

    What is sent is lost where it arrives in a callback whose exceptions Python ignores (a finalizer, the collector's), so it is
    sent again until it has been heard.
    """
    over, thread = threading.Event(), threading.get_ident()
    lock, said = threading.Lock(), []

    def watch() -> None:
        worked, waited = time.process_time(), time.monotonic()
        while not over.wait(_AGAIN if said else _LOOK):
            late = time.process_time() - worked > seconds or time.monotonic() - waited > ASLEEP * seconds
            with lock:
                if not over.is_set() and (said or late):
                    said[:] = [f"{seconds:.0f} s"]
                    _send(thread, ctypes.py_object(_Stopped))

    def end() -> None:
        with lock:
            over.set()
        _send(thread, None)  # what has not arrived yet

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
        end()
        if said:
            raise _Stopped
    except _Stopped as stopped:
        stopped.args = (said[0] if said else f"{seconds:.0f} s",)
        raise
    finally:
        end()


def _send(thread: int, what: ctypes.py_object | None) -> None:
    """Raise it in that thread soon, or take back what was sent."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), what)
