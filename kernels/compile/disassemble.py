"""Disassemble: the machine code of a file as text, by CUDA's own tools. It runs nothing of the file.

`nvdisasm` and `cuobjdump` are taken from PATH, from CUDA_HOME, or from Triton's wheel, which brings both.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from ...simulator.code import sass
from ...simulator.errors import UsageError

MAX_BYTES = 1 << 30
"""Of a library; the largest wheels of attention kernels hold 800 MB."""
MODULES = 24
"""Of a library that are read at most, since each takes seconds."""
ARCHITECTURES = ("sm_90a", "sm_90")
"""Whose machine code is read, in this order: WGMMA needs the first, kernels of mma.sync may be for the second."""
SECONDS = 300
"""Of one run of a tool."""
_TARGET, _HEADER = re.compile(r"^\s*\.target\s+(sm_\d+[a-z]?)", re.MULTILINE), 1 << 16
_ELF, _CUDA_MACHINE = b"\x7fELF", 190


class MissingDisassembler(RuntimeError):
    """No disassembler is installed; the message says what to install."""


def tool(name: str) -> str:
    """The path of `nvdisasm`, `cuobjdump` or `ptxas`. Raises MissingDisassembler, saying what to install."""
    homes = [os.environ.get(variable) for variable in ("CUDA_HOME", "CUDA_PATH")]
    places = [Path(home, "bin") for home in homes if home]
    if found := importlib.util.find_spec("triton"):
        places.append(Path(found.submodule_search_locations[0], "backends", "nvidia", "bin"))
    where = [os.environ.get("PATH", ""), *map(str, places)]
    where = os.pathsep.join(reversed(where) if name == "ptxas" else where)  # PTX asks for an assembler as new as its compiler
    if path := shutil.which(name, path=where):
        return path
    raise MissingDisassembler(f"{name} is not here: pip install triton, or set CUDA_HOME to a CUDA toolkit")


def kernels_of(path: Path, wanted: str | None = None, modules: int = MODULES) -> list[sass.Code]:
    """The kernels in a .cubin, or for a Hopper in a library or object with such code inside; PTX is compiled first, by ptxas.

    `wanted` is a part of a name: only cubins that mention it are read, and no more than `modules` of them. Raises UsageError,
    one sentence, where the file is none or has none, and MissingDisassembler.
    """
    head = _head(path)
    if path.suffix == ".ptx":
        found = _compiled(path)
    elif head[:4] != _ELF:
        raise UsageError(f"{path} holds no machine code: give a .cubin, a .ptx, or a library (.so) or object with CUDA code in it")
    else:
        is_cubin = int.from_bytes(head[18:20], "little") == _CUDA_MACHINE
        found = _read(path) if is_cubin else _inside(path, wanted, modules)
    chosen = [code for code in found if wanted is None or wanted in code.name]
    if not chosen:
        raise UsageError(f"{path} has no kernel" + (f" with {wanted!r} in its name" if wanted else ""))
    return chosen


def of_cubin(cubin: bytes) -> list[sass.Code]:
    """The kernels of a cubin that was just compiled. Raises MissingDisassembler."""
    with tempfile.TemporaryDirectory(prefix="fasim-") as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        return _read(path)


def _head(path: Path) -> bytes:
    if not path.is_file():
        raise UsageError(f"{str(path)!r} is no file, and no CUDA kernel of ours has that name")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UsageError(f"{path} has {size:,} bytes, more than the {MAX_BYTES:,} that are read")
    with path.open("rb") as file:
        return file.read(64)


def _read(path: Path) -> list[sass.Code]:
    return sass.read(_run(path, tool("nvdisasm"), "-hex", str(path)))


def _compiled(path: Path) -> list[sass.Code]:
    """The kernels of a .ptx, for the architecture that it is for."""
    with path.open(encoding="utf-8", errors="replace") as file:
        found = _TARGET.search(file.read(_HEADER))
    if not found:
        raise UsageError(f"{path} is no PTX: it names no .target such as sm_90a")
    with tempfile.TemporaryDirectory(prefix="fasim-") as folder:
        cubin = Path(folder, "kernel.cubin")
        _run(path, tool("ptxas"), "-arch", found[1], str(path.resolve()), "-o", str(cubin))
        return sass.read(_run(path, tool("nvdisasm"), "-hex", str(cubin)))


def _inside(path: Path, wanted: str | None, modules: int) -> list[sass.Code]:
    """The cubins of a library, one after the other."""
    with tempfile.TemporaryDirectory(prefix="fasim-") as folder:
        there, kept = False, []
        for architecture in ARCHITECTURES:
            if kept:
                break
            room = Path(folder, architecture)
            room.mkdir()
            _run(path, tool("cuobjdump"), "-arch", architecture, "-xelf", "all", str(path.resolve()), cwd=str(room))
            cubins = sorted(room.glob("*.cubin"))
            there = there or bool(cubins)
            kept = [each for each in cubins if wanted is None or wanted.encode() in each.read_bytes()]
        if not there:
            raise UsageError(f"{path} has no machine code for {' or '.join(ARCHITECTURES)} in it")
        if len(kept) > modules:
            named = f"with {wanted!r} in them" if wanted else "inside"
            raise UsageError(
                f"{path} has {len(kept)} modules {named}, which would take minutes: give more of a kernel's name, as FILE:NAME "
                f"(inspect: --kernel NAME), such as {_some_name(path)}"
            )
        return [code for each in kept for code in _read(each)]


def _some_name(path: Path) -> str:
    """The longest name of a kernel in a library."""
    said = _run(path, tool("cuobjdump"), "-arch", "sm_90a", "--dump-resource-usage", str(path.resolve()))
    return max(re.findall(r"Function (\S+):", said), key=len, default="attention_forward")


def _run(path: Path, *command: str, cwd: str | None = None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS, cwd=cwd, check=False)
    except subprocess.TimeoutExpired:
        raise UsageError(f"{path} takes more than {SECONDS} s to disassemble: name one kernel with --kernel") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[:200]
        raise UsageError(f"{path} cannot be read: {said or Path(command[0]).name + ' failed'}")
    return done.stdout
