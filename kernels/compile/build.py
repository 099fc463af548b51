"""CUDA C++ to an sm_90a cubin by NVRTC, kept on disk: a second start compiles nothing. No GPU is needed.

An entry of the cache is two files, the cubin and a JSON report of what ptxas said of it, named by a hash of everything
the cubin depends on. FASIM_CACHE_DIR, or else XDG_CACHE_HOME, says where.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import struct
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path

from ...simulator.errors import UsageError
from ...simulator.reading import read_bytes, read_json
from ...traces.files import cache_folder

ARCH = "sm_90a"
ENTRY = "attention_forward"
"""The kernel that every source defines."""
SMEM_SYMBOL = "attention_smem_bytes"
"""The constant by which a source says how much dynamic shared memory its launch needs."""
_FORMAT = 1  # of the report; raising it leaves old entries unread
_REPORT_BYTES = 1 << 20
_ERRORS_SHOWN = 5
_importing = threading.Lock()  # cuda.core cannot be imported by two threads at once


class MissingCompiler(UsageError):
    """NVRTC is needed and not installed; the message says how to get it."""


class CompileError(UsageError):
    """The compiler refused a source; the message is one sentence, then the first errors with file and line."""


class BuildWarning(UserWarning):
    """The compiler accepted a source with remarks."""


@dataclass(frozen=True)
class Source:
    """What a cubin is made of: the text of `name`, the headers it may include by name, its -D macros."""

    name: str
    text: str
    headers: Mapping[str, str] = field(default_factory=dict)
    defines: Mapping[str, int] = field(default_factory=dict)
    fast_math: bool = False

    @property
    def digest(self) -> str:
        """Hash of all of it; two sources of one digest make one cubin under one compiler."""
        parts = [_FORMAT, ARCH, self.name, self.text, sorted(self.headers.items()), sorted(self.defines.items()), self.fast_math]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Report:
    """What the compiler said of a kernel: resources per thread and CTA, and its remarks."""

    registers: int  # per thread at entry; setmaxnreg moves them between warpgroups later
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    static_smem_bytes: int
    dynamic_smem_bytes: int  # SMEM_SYMBOL's value; 0 where the source does not export it
    cubin_bytes: int
    compiler: str
    remarks: tuple[str, ...] = ()

    @property
    def spill_bytes(self) -> int:
        """Bytes per thread stored and loaded because registers ran out."""
        return self.spill_store_bytes + self.spill_load_bytes

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA, static and dynamic."""
        return self.static_smem_bytes + self.dynamic_smem_bytes


@dataclass(frozen=True)
class Built:
    """A cubin, its report, and whether it was found in the cache."""

    cubin: bytes
    report: Report
    cached: bool


def build(source: Source) -> Built:
    """The cubin of `source`, from the cache or else compiled and kept there.

    Raises CompileError with the compiler's first errors, MissingCompiler where it is in no cache and NVRTC is not
    installed. Remarks of a fresh compilation are Python warnings too (BuildWarning).
    """
    found = lookup(source)
    if found:
        return found
    compiler = compiler_version()
    if compiler is None:
        raise MissingCompiler(
            f"{source.name} is not in the cache and compiling it needs NVRTC, which is not installed:"
            " pip install 'fasim[kernels]' on Linux"
        )
    cubin, log = _compile(source)
    report = read_log(log, cubin, compiler)
    if report.remarks:
        warnings.warn(f"{source.name}: " + "; ".join(report.remarks), BuildWarning, stacklevel=2)
    try:
        _keep(source, compiler, cubin, report)
    except OSError as error:
        warnings.warn(
            f"compiled kernels cannot be kept ({error.strerror}{f': {error.filename}' if error.filename else ''}); set"
            " FASIM_CACHE_DIR to a folder that can be written, or every start compiles anew",
            BuildWarning,
            stacklevel=2,
        )
    return Built(cubin, report, cached=False)


def build_all(
    sources: Sequence[Source], advance: Callable[[int, int, str], None] = lambda done, total, name: None
) -> list[Built | CompileError]:
    """What `build` makes of every source, on all cores; a source that does not compile has its error in its place.

    `advance(done, total, name)` is called as each is done. Raises MissingCompiler.
    """

    def one(source: Source) -> Built | CompileError:
        try:
            return build(source)
        except CompileError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # NVRTC compiles without the GIL
        tasks = {pool.submit(one, source): source.name for source in sources}
        try:
            for done, task in enumerate(as_completed(tasks), 1):
                task.result()
                advance(done, len(tasks), tasks[task])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [task.result() for task in tasks]


def lookup(source: Source) -> Built | None:
    """The cache's entry for `source`, whole, or None; without NVRTC one of any compiler will do."""
    pattern = f"{_stem(source)}-nvrtc{compiler_version() or '*'}.json"
    try:
        found = sorted(cache_dir().glob(pattern))
    except OSError:
        return None
    for path in found:
        try:
            entry = read_json(path, "report", _REPORT_BYTES)
            cubin = read_bytes(path.with_suffix(".cubin"), "cubin")
            if hashlib.sha256(cubin).hexdigest() == entry["sha256"]:
                return Built(cubin, _report(entry["report"]), cached=True)
        except (ValueError, KeyError, TypeError):
            continue  # half an entry is none
    return None


def _report(entry: dict) -> Report:
    """A report as it was kept; ValueError, KeyError or TypeError where it is not one."""
    report = Report(**entry | {"remarks": tuple(entry["remarks"])})
    for each in fields(Report):
        value = getattr(report, each.name)
        if each.type == "int":
            whole = type(value) is int and 0 <= value < 1 << 31
        else:
            whole = all(isinstance(text, str) for text in (value if each.name == "remarks" else (value,)))
        if not whole:
            raise ValueError(f"{each.name} is {type(value).__name__}")
    return report


def cache_dir() -> Path:
    """Where cubins are kept: FASIM_CACHE_DIR, or fasim/ in XDG_CACHE_HOME or ~/.cache. OSError for one without a home."""
    folder = cache_folder("cubin")
    if folder is None:
        raise OSError(errno.ENOENT, "there is no home directory")
    return folder


_version: list[str | None] = []


def compiler_version() -> str | None:
    """NVRTC's version, as 13.0, or None where cuda-core, cuda-bindings or NVRTC itself is not installed."""
    if not _version:
        _version.append(_ask_version())
    return _version[0]


def _ask_version() -> str | None:
    try:
        if find_spec("cuda.core") is None:  # importing it takes a quarter of a second, which only compiling is worth
            return None
        from cuda.bindings import nvrtc

        error, major, minor = nvrtc.nvrtcVersion()
    except Exception:  # the bindings raise their own kinds where the library is missing
        return None
    return None if int(error) else f"{major}.{minor}"


def _compile(source: Source) -> tuple[bytes, str]:
    """(cubin, log) by NVRTC; raises CompileError."""
    with _importing:
        from cuda.core import Program, ProgramOptions

    log = io.StringIO()
    with tempfile.TemporaryDirectory(prefix="fasim-") as folder:
        for name, text in source.headers.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        options = ProgramOptions(
            name=source.name,
            arch=ARCH,
            std="c++17",
            include_path=[folder],
            define_macro=[(name, str(value)) for name, value in source.defines.items()] or None,
            use_fast_math=source.fast_math,
            ptxas_options=["-v"],
        )
        try:
            cubin = bytes(Program(source.text, "c++", options).compile("cubin", logs=log).code)
        except Exception as error:
            if type(error).__name__ != "NVRTCError":  # cuda.core keeps its error kinds private
                raise
            raise CompileError(_readable(source, str(error).replace(f"{folder}/", ""))) from None
        return cubin, log.getvalue().replace(f"{folder}/", "")


def _readable(source: Source, log: str) -> str:
    """One sentence and the first errors with file and line."""
    found = re.findall(r"^(\S+\(\d+\): (?:catastrophic )?error.*|ptxas .*(?:error|fatal).*|.*: fatal error.*)$", log, re.MULTILINE)
    shown = found[:_ERRORS_SHOWN] or [line for line in log.splitlines() if line.strip()][:_ERRORS_SHOWN]
    more = f"\n  and {len(found) - len(shown)} more" if len(found) > len(shown) else ""
    macros = " ".join(f"-D{name}={value}" for name, value in source.defines.items())
    variant = f" with {macros}" if macros else ""
    return f"{source.name} does not compile{variant}:\n  " + "\n  ".join(shown) + more


def read_log(log: str, cubin: bytes, compiler: str) -> Report:
    """The report that ptxas -v and the front end's remarks amount to."""

    def figure(pattern: str) -> int:
        found = re.search(pattern, log)
        return int(found[1]) if found else 0

    remarks = re.findall(r"^.*(?:warning|\(C\d{4}\)|Potential Performance Loss).*$", log, re.MULTILINE)
    remarks = [line.strip() for line in remarks if not line.startswith("Remark:")]
    return Report(
        registers=figure(r"Used (\d+) registers"),
        stack_bytes=figure(r"(\d+) bytes stack frame"),
        spill_store_bytes=figure(r"(\d+) bytes spill stores"),
        spill_load_bytes=figure(r"(\d+) bytes spill loads"),
        static_smem_bytes=figure(r"(\d+) bytes smem"),
        dynamic_smem_bytes=constant(cubin, SMEM_SYMBOL) or 0,
        cubin_bytes=len(cubin),
        compiler=f"NVRTC {compiler}",
        remarks=tuple(dict.fromkeys(remarks)),
    )


def constant(cubin: bytes, name: str) -> int | None:
    """The initial value of the 32-bit variable `name` of a cubin, read from its ELF symbol table; None if there is none."""
    sections = _sections(cubin)
    for _, kind, _, _, start, size, link, *_ in sections:
        if kind != 2:  # SHT_SYMTAB
            continue
        strings = sections[link][4]
        for at in range(start, start + size, 24):
            label, _, _, home, value, _ = struct.unpack_from("<IBBHQQ", cubin, at)
            if _name_at(cubin, strings + label) == name and 0 < home < len(sections):
                return struct.unpack_from("<i", cubin, sections[home][4] + value)[0]
    return None


def machine_code(cubin: bytes) -> dict[str, bytes]:
    """The instructions of each kernel of a cubin, by the name of its section, and nothing of the file around them."""
    sections, at = _sections(cubin), struct.unpack_from("<H", cubin, 62)[0]
    named = {_name_at(cubin, sections[at][4] + label): (start, size) for label, _, _, _, start, size, *_ in sections}
    return {name: cubin[start : start + size] for name, (start, size) in named.items() if name.startswith(".text.")}


def _sections(cubin: bytes) -> list[tuple]:
    sections_at, *_, entry_bytes, count, _ = struct.unpack_from("<QIHHHHHH", cubin, 40)
    return [struct.unpack_from("<IIQQQQIIQQ", cubin, sections_at + i * entry_bytes) for i in range(count)]


def _name_at(cubin: bytes, begin: int) -> str:
    return cubin[begin : cubin.index(b"\0", begin)].decode()


def _stem(source: Source) -> str:
    return f"{Path(source.name).stem}-{source.digest[:32]}"


def _keep(source: Source, compiler: str, cubin: bytes, report: Report) -> None:
    """Write the entry, the report last: it vouches for the cubin."""
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{_stem(source)}-nvrtc{compiler}"
    entry = {"source": source.name, "defines": dict(source.defines), "sha256": hashlib.sha256(cubin).hexdigest()}
    entry["report"] = asdict(report)
    for name, data in ((f"{stem}.cubin", cubin), (f"{stem}.json", json.dumps(entry, indent=1).encode())):
        handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, folder / name)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
