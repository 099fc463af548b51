"""What MkDocs does not find as files: pages made from the commands, the lessons, the schedules and the recordings.

FASIM_DOCS_RUNS=20 makes a quick build: it compares no more than so many recorded runs of each folder, and leaves the course out.
"""

from __future__ import annotations

import io
import os
import re
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

from mkdocs.structure.files import File

from fasim import Workload, predict, timeline
from fasim.cli.main import app, run
from fasim.simulator.devices.device import DEVICE_NAMES, load_device
from fasim.simulator.schedules import SCHEDULES
from fasim.traces import ladder, store
from fasim.traces.lessons import LESSONS, Course

RUNS = "FASIM_DOCS_RUNS"


def on_files(files, config):
    """Add the pages that are made, and the figures in them."""
    made = {
        "commands.md": commands(),
        "catalogue.md": catalogue(),
        "accuracy.md": accuracy(),
        "img/fa3.svg": figure(("fa3",)),
        "img/ideas.svg": figure(("warp-specialized", "pingpong", "fa3")),
        "img/backward.svg": recorded(BACKWARD_TIMELINE),
    }
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown, page, **_):
    """`{{ lessons }}` and whatever else PARTS has is put in the place of its mark."""
    for name, make in PARTS.items():
        if (mark := "{{ " + name + " }}") in markdown:
            markdown = markdown.replace(mark, make())
    return markdown


PARTS = {
    "lessons": lambda: lessons(),
    "ladder": ladder.ladder,
    "last rungs": ladder.last_rungs,
    "hand-overs": ladder.hand_overs,
    "code of the ladder": ladder.code,
    "tiles of the ladder": ladder.tiles,
    "tiles dealt": ladder.dealt,
    "forms of fa2": ladder.forms,
    "stalls of the ladder": ladder.stalls,
    "predicted": lambda: ladder.predicted(lambda workload, schedule: predict(workload, schedule, "h200")),
}
"""Marks in pages, and what is put in their place."""


def on_post_build(config):
    """The course as pages, beside the documentation; not in a quick build."""
    if os.environ.get(RUNS):
        return
    from fasim.cli.site.build import site

    folder = Path(config["site_dir"]) / "learn"
    folder.mkdir(exist_ok=True)
    for name, text in site(Course(load_device("h200"))).items():
        (folder / name).write_text(text, encoding="utf-8")


def commands() -> str:
    """Every command with its options, from the commands themselves."""
    text = app.generate_docs(output_format="markdown").replace("# fasim", "# Commands", 1)
    return re.sub(r"## Table of Contents\n.*?(?=\*\*Commands\*\*)", "", text, flags=re.DOTALL)


def lessons() -> str:
    """The lessons in their order."""
    rows = [f"| {entry.number} | {entry.title} | {entry.about} |" for entry in LESSONS]
    return "\n".join(["| | lesson | what it is about |", "|---|---|---|", *rows])


def catalogue() -> str:
    """Schedules with their ideas and papers, devices with what they are known for."""
    lines = ["# Schedules and devices", "", "## Schedules", "", "| schedule | idea | source |", "|---|---|---|"]
    lines += [f"| `{each.name}` | {each.summary} | {each.paper} |" for each in SCHEDULES.values()]
    lines += ["", "## Devices", "", "`fasim devices NAME` prints every field with its unit and its source.", ""]
    lines += ["| device | SMs | clock | HBM | L2 | TMA and WGMMA |", "|---|---|---|---|---|---|"]
    for name in DEVICE_NAMES:
        gpu = load_device(name)
        hopper = "yes" if gpu.tma and gpu.wgmma else "no"
        lines.append(
            f"| `{name}` | {gpu.sms} | {gpu.max_clock_hz / 1e6:,.0f} MHz | {gpu.hbm_bytes_per_s / 1e12:.2f} TB/s "
            f"| {gpu.l2_bytes / 2**20:.0f} MiB | {hopper} |"
        )
    return "\n".join(lines) + "\n"


def accuracy() -> str:
    """The tables of `fasim compare`, made now from the recordings."""
    most = int(os.environ.get(RUNS, "0"))
    paths = [] if not most else [str(path) for folder in (store.RECORDED, store.BLIND, store.PEERS) for path in _some(folder, most)]
    out = io.StringIO()
    with redirect_stdout(out):
        status = run(["compare", "--markdown", *paths])
    if status:
        raise RuntimeError(f"fasim compare ended with {status}")
    which = f"Of each folder {most} runs, for a quick build." if most else "Every recorded run."
    return f"""# Accuracy

Predictions beside what hardware did, made from the recordings when these pages were built. {which} None of the model's
constants comes from a run in these tables; which runs it was made beside, and which it met once it was finished, is kept apart.

<div class="numbers" markdown="1">
{out.getvalue()}
</div>

`fasim compare` prints the same, one run in full with `fasim compare PATH`; `fasim published` sets the papers' bars beside
predictions. Where the model fails, and what it does not know, is in `simulator/NOTES.md`.
"""


def _some(folder: Path, most: int) -> list[Path]:
    """So many runs, evenly spread."""
    found = sorted(folder.glob("*.run.json"))
    return found[:: max(1, len(found) // most)][:most]


BACKWARD_TIMELINE = "apart-cuda-b4h16s4096d128-bf16-backward-burst.run.json.gz"
"""Of the fastest backward that was recorded."""


def recorded(name: str) -> str:
    """A recorded timeline of the backward under its prediction."""
    with TemporaryDirectory() as folder:
        drawn = Path(folder) / "drawn.svg"
        path = store.RECORDED.parent / "backward" / "timelines" / name
        with redirect_stdout(io.StringIO()):
            run(["compare", "--timeline", str(path), "--iterations", "3-5", "--svg", str(drawn), "--width", "140"])
        return drawn.read_text(encoding="utf-8")


def figure(schedules: tuple[str, ...]) -> str:
    """A timeline of these schedules on an H200."""
    runs = [predict(Workload(batch=4, heads=16, seqlen=4096), name, "h200") for name in schedules]
    return timeline(*runs)._repr_svg_()
