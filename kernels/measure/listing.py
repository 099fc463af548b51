"""Machine code of kernels that are made at run time, as Nsight Compute lists it.

`python -m fasim.kernels.measure.listing --plan P --of REGEX --out DIR`: every kernel of a plan's calls with such a name is run
once with its instructions counted; DIR/listing.csv.gz is Nsight Compute's page of sources of all of them: each instruction of
each, in order, with how often it was executed. From it a schedule's order and its code are read where no file holds them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ...simulator.errors import UsageError
from ..validation.check import MissingTool
from . import counters
from .plan import Entry, read


def commands(ncu: str, folder: Path, of: str, plan: Path) -> list[list[str]]:
    """Nsight Compute around the plan's calls, into a report, and once more to print what that holds."""
    return [
        [
            ncu, "--target-processes", "application-only", "--clock-control", "none", "--profile-from-start", "off",
            "--kernel-name", f"regex:{of}", "--section", "SourceCounters", "--export", str(folder / "report"),
            *counters.child(plan),
        ],
        [ncu, "--import", str(folder / "report.ncu-rep"), "--page", "source", "--csv"],
    ]  # fmt: skip


def listed(of: str, plan: Sequence[Entry], seconds: float) -> tuple[str, str]:
    """What Nsight Compute prints of the kernels, and what it and the program said. Raises MissingTool without it."""
    ncu, text, said, began = counters.require(), "", "", time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fasim-ncu-") as place:
        folder = Path(place)
        (folder / "plan.json").write_text(json.dumps([entry.to_dict() for entry in plan]), encoding="utf-8")
        for command in commands(ncu, folder, of, folder / "plan.json"):
            left = seconds - (time.monotonic() - began)
            try:
                done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=left, check=False)
            except subprocess.TimeoutExpired:
                return "", said + f"Nsight Compute did not end within {seconds:g} s\n"
            text, said = done.stdout, said + done.stderr + (done.stdout if command[1] != "--import" else "")
    return text, said


def main() -> int:
    """0 where something was listed, 1 where nothing was, 2 usage, 3 without Nsight Compute."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", type=Path, required=True, help="TOML file of [[runs]]")
    parser.add_argument("--of", required=True, help="regular expression of the kernels' names")
    parser.add_argument("--out", type=Path, required=True, help="folder for listing.csv.gz")
    parser.add_argument("--seconds", type=float, default=120, help="for all of it")
    given = parser.parse_args()
    try:
        text, said = listed(given.of, read(given.plan), given.seconds)
    except UsageError as error:
        parser.error(str(error))
    except MissingTool as error:
        sys.stderr.write(f"{error}\n")
        return 3
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "listing.csv.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    count = text.count("\n")
    sys.stdout.write(f"{count:,} lines\n{said[-2000:]}")
    return 0 if "MMA" in text else 1


if __name__ == "__main__":
    sys.exit(main())
