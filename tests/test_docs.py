"""The documentation builds with strict links, names files and commands that are there, and makes its tables from the recordings."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import fasim as package
from fasim.cli.main import app
from fasim.traces.lessons import LESSONS

ROOT = Path(package.__file__).parent
DOCS = sorted((ROOT / "docs").glob("*.md"))


def build(root: Path, into: Path) -> subprocess.CompletedProcess:
    """MkDocs over a folder with mkdocs.yml and docs."""
    there = {"FASIM_DOCS_RUNS": "1", "FASIM_CACHE_DIR": str(into.with_name("kept"))}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(into)]
    return subprocess.run(command, cwd=root, env=os.environ | there, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    into = tmp_path_factory.mktemp("docs")
    done = build(ROOT, into)
    assert done.returncode == 0, done.stderr
    return into


def text(page: Path) -> str:
    return re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8"))


def test_every_page_is_built_and_nothing_is_fetched_from_elsewhere(site):
    for page in DOCS:
        html = (site / page.with_suffix(".html").name).read_text(encoding="utf-8")
        assert not re.findall(r'(?:src|href)="(?:https?:)?//(?!www\.mkdocs\.org)[^"]*"', html), page.name


def test_the_reference_has_every_command_and_option(site):
    found = text(site / "commands.html")
    for name in app:
        assert f"fasim {name}" in found or name.startswith("-")
    assert "--schedule" in found and "--html" in found


def test_the_tables_are_made_from_the_recordings(site):
    found = text(site / "accuracy.html")
    assert "beside which the model was made" in found and "other people" in found.lower()
    assert re.search(r"\d\.\d %", found)
    assert all(entry.title in found for found in [text(site / "course.html").replace("&#x27;", "'")] for entry in LESSONS)


def test_a_broken_link_breaks_the_build(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Start\n\n[nowhere](nowhere.md)\n")
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[0]
    (tmp_path / "mkdocs.yml").write_text(re.sub(r"(?m)^(hooks|exclude_docs|extra_css):.*\n", "", settings))
    done = build(tmp_path, tmp_path / "out")
    assert done.returncode != 0 and "nowhere.md" in done.stderr


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_files_and_commands_that_a_page_names_are_there(page):
    said = page.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:simulator|kernels|traces|cli|tests|examples)/[\w./-]*)`", said):
        assert (ROOT / path).exists(), path
    for line in re.findall(r"(?m)(?:^|`)(fasim [^`\n]+)", said):
        _, command, *rest = shlex.split(line)
        assert command in app, line
        options = text_of_help(command)
        for option in (each for each in rest if each.startswith("--")):
            assert option in options, line


@cache
def reference() -> str:
    return app.generate_docs(output_format="markdown")


def text_of_help(command: str) -> str:
    return reference().split(f"## fasim {command}\n")[1].split("\n## ")[0]
