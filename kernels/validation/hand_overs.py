"""Which hand-overs through shared memory racecheck follows: `python -m fasim.kernels.validation.hand_overs --out FILE`.

A kernel each (hand_overs.cu, which says what orders it), run once under compute-sanitizer's racecheck. A
hand-over that is ordered and is reported all the same is one that the tool does not follow: of a kernel that hands over so its
report says nothing. Needs a GPU of compute capability 9.0 and compute-sanitizer.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from ...simulator.reading import parse_json
from . import sanitize

SOURCE = Path(__file__).with_suffix(".cu")
CONTROL = "nothing"
"""The one that is a race."""
READERS, THREADS = 128, 160


def names() -> list[str]:
    """The kernels, in their order in the source."""
    return re.findall(r"^(?:WRITTEN_THEN_READ|READ_THEN_WRITTEN)\((\w+),", SOURCE.read_text(encoding="utf-8"), re.MULTILINE)


def run() -> dict[str, bool]:
    """Launch each once; whether what was read was what the order says."""
    import torch

    from ..calibrate.harness import Module

    module = Module(SOURCE.read_text(encoding="utf-8"))
    right = {}
    for name in names():
        out = torch.zeros(READERS, dtype=torch.int32, device="cuda")
        module.launch(name, 1, THREADS, [out])
        torch.cuda.synchronize()
        right[name] = bool((out == 1).all())
    return right


def read(text: str) -> dict[str, list[str]]:
    """What racecheck said of each kernel."""
    said: dict[str, list[str]] = {name: [] for name in names()}
    for lines in sanitize.complaints(text):
        for name in said:
            if any(re.search(rf"\b{name}(\(|\+|\b)", line) for line in lines):
                said[name].append(" ".join(lines))
    return said


def main() -> None:
    """Run them under racecheck, write FILE, show what it follows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="file for the JSON results")
    parser.add_argument("--run", action="store_true", help="only launch them, in this process")
    given = parser.parse_args()
    if given.run:
        import torch

        sys.stdout.write(f"right: {json.dumps(run())}\ndevice: {json.dumps(torch.cuda.get_device_name())}\n")
        return
    command = [sanitize.require(), "--tool", "racecheck", sys.executable, "-m", __spec__.name, "--run"]
    path = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    found = re.search(r"^right: (.*)\ndevice: (.*)$", done.stdout, re.MULTILINE)
    if not found:
        raise SystemExit(f"the kernels did not run: {(done.stdout + done.stderr)[-500:]}")
    right, said = parse_json(found[1], "what the kernels printed"), read(done.stdout + done.stderr)
    version = subprocess.run([sanitize.require(), "--version"], capture_output=True, text=True, check=False).stdout
    rows = [{"hand_over": name, "right": right[name], "reported": said[name]} for name in said]
    result = {
        "schema": "fasim.hand-overs/1",
        "date": datetime.date.today().isoformat(),
        "device": parse_json(found[2], "what the kernels printed"),
        "tool": next((line for line in version.splitlines() if "ersion" in line), ""),
        "source_sha256": hashlib.sha256(SOURCE.read_bytes()).hexdigest(),
        "rows": rows,
    }
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        what = "reported" if row["reported"] else "not reported"
        sys.stdout.write(f"{row['hand_over']:50} {'right' if row['right'] else 'WRONG'}, {what}\n")


if __name__ == "__main__":
    main()
