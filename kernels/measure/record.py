"""A record of times: what it was made by and on what, and its rows, kept as they come."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
STARTED = time.monotonic()
PACKAGES = ("torch", "triton", "fa3-fwd", "flash-attn-4")


def parser(summary: str, name: str, deadline_s: float) -> argparse.ArgumentParser:
    """Of a command that keeps rows in DIR/`name`.json."""
    made = argparse.ArgumentParser(description=summary)
    made.add_argument("--out", type=Path, help=f"folder for {name}.json")
    made.add_argument("--deadline", type=float, default=deadline_s, help="seconds behind which no row begins")
    return made


def begun(schema: str, source: str, kernels: Iterable[Path]) -> dict:
    """A record without rows: the device and its driver, versions, and hashes of the command's text and of the kernels'."""
    import pynvml

    pynvml.nvmlInit()
    return {
        "schema": schema,
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "driver": pynvml.nvmlSystemGetDriverVersion(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "source": Path(source).relative_to(ROOT).as_posix(),
        "source_sha256": _sha256(Path(source)),
        "kernel_sha256": {path.relative_to(ROOT).as_posix(): _sha256(path) for path in sorted(kernels)},
        "rows": [],
        "not_reached": [],
    }


def keep(
    result: dict, path: Path, cases: Sequence, row_of: Callable[..., dict], line_of: Callable[[dict], str], deadline_s: float
) -> None:
    """Take a row of every case, a tuple of row_of's arguments, before the deadline; write the record after each, and show it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for case in cases:
        if time.monotonic() - STARTED > deadline_s:
            result["not_reached"].append([getattr(each, "name", each) for each in case])
        else:
            result["rows"].append(row_of(*case))
            torch.cuda.empty_cache()
            sys.stderr.write(line_of(result["rows"][-1]) + "\n")
        result["seconds"] = round(time.monotonic() - STARTED, 1)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write("\n".join(line_of(row) for row in result["rows"]) + "\n")


def version_of(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def output_of(answer: object) -> torch.Tensor:
    """O of a kernel's answer, which may have LSE beside it."""
    return answer[0] if isinstance(answer, tuple) else answer


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
