"""Doctor: what this machine has, what can be done with it, and what to install for the rest. Imports nothing heavy but torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .measure import counters
from .measure.board import Board
from .validation import sanitize
from .validation.check import MissingTool

KERNELS_EXTRA = "pip install 'fasim[kernels]'"
_NVIDIA_PARAMETERS = Path("/proc/driver/nvidia/params")


@dataclass(frozen=True)
class Finding:
    """One thing a machine has or lacks: `found` is a version or path, or why not; `remedy` what to do where it lacks it."""

    name: str
    present: bool
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Ability:
    """One thing to do with the package, what it needs by the findings' names, and which of that is missing."""

    command: str
    what: str
    needs: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def possible(self) -> bool:
        """Nothing is missing."""
        return not self.missing


@dataclass(frozen=True)
class Diagnosis:
    """Everything found, and what follows from it."""

    findings: tuple[Finding, ...]
    abilities: tuple[Ability, ...]

    def to_dict(self) -> dict:
        """As plain JSON values."""
        return {
            "findings": [dict(vars(each)) for each in self.findings],
            "abilities": [
                {**vars(each), "needs": list(each.needs), "missing": list(each.missing), "possible": each.possible}
                for each in self.abilities
            ],
        }


ABILITIES = {
    "fasim predict, timeline, roofline, published, compare": ("simulate, and compare recorded runs", ()),
    "fasim validate --self-test": ("hold the validation suite to its planted faults, on the CPU", ("torch",)),
    "fasim validate": ("check a kernel", ("torch", "GPU for torch", "triton")),
    "fasim validate --sanitize": (
        "also look for races and bad accesses", ("torch", "GPU for torch", "triton", "compute-sanitizer"),
    ),
    "our Hopper kernels": (
        "compile and run the CUDA schedules", ("torch", "GPU for torch", "compute capability 9.0", "NVRTC"),
    ),
    "fasim measure": ("time, clock, power, energy", ("torch", "GPU for torch", "NVML")),
    "fasim measure --counters": (
        "cycles, bytes and utilisations", ("torch", "GPU for torch", "NVML", "Nsight Compute", "access to counters"),
    ),
    "fasim calibrate": (
        "microbenchmarks for a device file",
        ("torch", "GPU for torch", "compute capability 9.0", "NVML", "NVRTC", "cuda-core", "Nsight Compute", "access to counters"),
    ),
}  # fmt: skip
"""Command -> what it does, and the findings it needs."""


def examine() -> Diagnosis:
    """Look at this machine. Takes a second or two, most of it torch's import; runs nothing on the GPU."""
    findings = (
        _nvml(), _capability(), _torch(), _gpu_for_torch(), _package("triton", "triton", "on Linux x86-64: "), _nvrtc(),
        _package("cuda-core", "cuda.core"), _ncu(), _permission(), _sanitizer(),
    )  # fmt: skip
    present = {each.name for each in findings if each.present}
    abilities = tuple(
        Ability(command, what, needs, tuple(name for name in needs if name not in present))
        for command, (what, needs) in ABILITIES.items()
    )
    return Diagnosis(findings, abilities)


def _nvml() -> Finding:
    try:
        board = Board()
        return Finding("NVML", True, f"{board.name}, driver {board.driver}, {board.power_limit_w:.0f} W limit")
    except MissingTool as error:
        return Finding("NVML", False, str(error), "a machine with an NVIDIA GPU and its driver, and pip install nvidia-ml-py")


def _capability() -> Finding:
    name = "compute capability 9.0"
    remedy = "a Hopper GPU (H100, H200): the CUDA schedules use TMA and WGMMA"
    try:
        major, minor = Board().compute_capability
    except MissingTool:
        return Finding(name, False, "no GPU seen", remedy)
    return Finding(name, (major, minor) == (9, 0), f"{major}.{minor}", remedy if (major, minor) != (9, 0) else "")


def _torch() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("torch", False, "not installed", KERNELS_EXTRA)
    return Finding("torch", True, _version("torch"))


def _gpu_for_torch() -> Finding:
    name = "GPU for torch"
    if importlib.util.find_spec("torch") is None:
        return Finding(name, False, "torch is not installed", KERNELS_EXTRA)
    try:
        import torch
    except Exception as error:  # a broken installation is a finding
        return Finding(name, False, f"torch does not import: {_first_line(error)}", "reinstall torch")
    if torch.cuda.is_available():
        return Finding(name, True, f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    if torch.version.cuda is None:
        return Finding(name, False, "this torch is built without CUDA", "install a CUDA build of torch (pytorch.org)")
    return Finding(name, False, "torch sees no GPU", "a machine with an NVIDIA GPU and its driver")


def _package(distribution: str, module: str, where: str = "") -> Finding:
    try:
        there = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the parent
        there = False
    if there:
        return Finding(distribution, True, _version(distribution))
    return Finding(distribution, False, "not installed", where + KERNELS_EXTRA)


def _nvrtc() -> Finding:
    try:
        from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
        if int(status) == 0:
            return Finding("NVRTC", True, f"{major}.{minor}")
        reason = f"nvrtcVersion gives {status}"
    except ModuleNotFoundError:
        reason = "cuda-bindings is not installed"
    except Exception as error:  # the library is missing or of another architecture
        reason = _first_line(error)
    return Finding("NVRTC", False, reason, KERNELS_EXTRA + " (nvidia-cuda-nvrtc, cuda-bindings)")


def _ncu() -> Finding:
    remedy = "the package nsight-compute of NVIDIA's CUDA repository"
    return _program("Nsight Compute", counters.find(), r"Version ([\d.]+)", remedy)


def _sanitizer() -> Finding:
    return _program("compute-sanitizer", sanitize.find(), r"version ([\d.]+)", "it comes with the CUDA toolkit")


def _program(name: str, path: str | None, pattern: str, remedy: str) -> Finding:
    if path is None:
        return Finding(name, False, "not on the PATH", remedy)
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(name, False, f"{path} does not start: {_first_line(error)}", remedy)
    version = re.search(pattern, said, re.IGNORECASE)
    return Finding(name, True, f"{version[1]}, {path}" if version else path)


def _permission(parameters: Path = _NVIDIA_PARAMETERS) -> Finding:
    """Whether the driver lets this user read counters (NVIDIA, ERR_NVGPUCTRPERM); a container can still forbid it."""
    name = "access to counters"
    try:
        text = parameters.read_text(encoding="utf-8")
    except OSError:
        text = ""
    restricted = re.search(r"^RmProfilingAdminOnly:\s*(\d)", text, re.MULTILINE)
    if restricted is None:
        if _is_root() and counters.find() and _nvml().present:
            return Finding(name, True, "root; the driver does not say whether it restricts counters")
        return Finding(name, False, "the driver does not say", "a machine with an NVIDIA GPU and its driver")
    if restricted[1] == "0":
        return Finding(name, True, "open to every user")
    if _is_root():
        return Finding(name, True, "restricted to root, which this is")
    return Finding(
        name, False, "restricted to root", "run as root, or load the nvidia module with NVreg_RestrictProfilingToAdminUsers=0"
    )


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
