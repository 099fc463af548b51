"""In Jupyter runs, walks, comparisons and timelines show themselves; the notebook of the examples runs from top to bottom."""

from __future__ import annotations

import xml.etree.ElementTree as xml
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import fasim as package
from fasim.simulator.units import scaled
from fasim.traces import store

ROOT = Path(package.__file__).parent
NOTEBOOK = ROOT / "examples" / "io_awareness.ipynb"


def test_the_notebook_runs_and_shows_tables_and_a_figure(monkeypatch):
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    book = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in book.cells), "outputs are made, not kept"
    NotebookClient(book, timeout=120, kernel_name="python3").execute()
    shown = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in shown if output.output_type == "error" or output.get("name") == "stderr"]
    kinds = [set(output.get("data", {})) for output in shown]
    assert sum("text/html" in kind for kind in kinds) == 6
    assert sum("image/svg+xml" in kind for kind in kinds) == 1


def test_a_run_shows_its_figures_and_what_was_not_measured_is_left_out(pingpong_run):
    page = pingpong_run._repr_html_()
    assert xml.fromstring(f"<div>{page}</div>") is not None
    assert f"{pingpong_run.cycles:,}" in page and "650 W" in page and pingpong_run.bottleneck.why in page
    measured = store.load(next(iter(sorted(store.PEERS.glob("*.run.json")))))
    assert "None" not in measured._repr_html_()


def test_a_comparison_shows_every_quantity_with_its_error(pingpong_run):
    measured = store.load(store.RECORDED / "fa3-cuda-b4h16s4096d128-fp16-sustained.run.json")
    shown = package.compare(replace(pingpong_run, workload=measured.workload), measured)
    rows = xml.fromstring(f"<div>{shown._repr_html_()}</div>").findall(".//tbody/tr")
    assert [row[0].text for row in rows] == [row.quantity.name for row in shown.rows]
    assert rows[0][3].text == f"{100 * shown.rows[0].error:+.1f} %"


def test_a_timeline_of_one_run_and_of_several_is_an_svg(pingpong_run, tmp_path):
    for runs in ((pingpong_run,), (pingpong_run, pingpong_run)):
        figure = package.timeline(*runs, width=800)
        drawn = xml.fromstring(figure._repr_svg_())
        assert drawn.tag.endswith("svg") and drawn.get("width") == "800"
    figure.save(tmp_path / "t.svg")
    assert (tmp_path / "t.svg").read_text(encoding="utf-8") == figure._repr_svg_()
    with pytest.raises(package.UsageError):
        package.timeline()


def test_a_walk_shows_its_sums():
    walked = package.walk(package.Workload(1, 1, 512), "fa1", "h200")
    assert all(scaled(total, "B") in walked._repr_html_() for total in walked.totals.values())
