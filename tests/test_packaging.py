"""The distribution holds every folder of the package and nothing heavy is imported before it is needed."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fasim

ROOT = Path(fasim.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ROOMS = ("simulator", "kernels", "traces", "cli")


def test_packages_lists_every_folder_with_an_init():
    folders = {"fasim"} | {
        "fasim." + ".".join(path.parent.relative_to(ROOT).parts)
        for room in ROOMS
        for path in (ROOT / room).rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders


def test_every_folder_with_python_is_a_package():
    bare = [p.parent for room in ROOMS for p in (ROOT / room).rglob("*.py") if not (p.parent / "__init__.py").exists()]
    assert bare == []


def test_package_data_names_files_that_exist():
    for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        for pattern in patterns:
            assert list(folder.glob(pattern)), f"{package}: {pattern} names no file"


def test_the_recordings_that_compare_reads_by_default_come_with_the_package():
    from fasim.traces.store import RECORDED, TIMELINES

    patterns = PROJECT["tool"]["setuptools"]["package-data"]["fasim.traces"]
    packed = {path for pattern in patterns for path in (ROOT / "traces").glob(pattern)}
    runs = {path for folder in (RECORDED, TIMELINES) for path in folder.iterdir() if ".run.json" in path.name}
    assert runs and runs <= packed


def test_the_version_is_written_once_per_place_and_agrees():
    assert PROJECT["project"]["version"] == fasim.__version__
    assert f"## {fasim.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_public_names_resolve():
    for name in fasim.__all__:
        assert getattr(fasim, name) is not None
    assert set(fasim.__all__) <= set(dir(fasim))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = fasim.nonsense


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import fasim", ("numpy", "numba", "rich", "cyclopts", "torch")),
        ("from fasim.cli.main import run; run(['--help'])", ("numpy", "numba", "torch", "triton")),
        ("from fasim.cli.main import run; run(['predict', '--help'])", ("numpy", "numba", "torch", "triton")),
        ("from fasim.cli.main import run; run(['predict', '--seqlen', '512'])", ("torch", "triton", "cuda")),
    ],
)
def test_start_up_imports_stay_light(code, absent, tmp_path):
    check = (
        f"{code}\nimport sys\nfound = [m for m in {absent!r} if m in sys.modules]\nsys.exit(str(found) if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
