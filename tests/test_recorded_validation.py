"""The validation reports recorded on an H200 are of the kernels that stand here, and their README explains all that fails."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("torch")

from fasim.kernels.gluon.config import NAMES as GLUON
from fasim.kernels.validation import mutants, subjects, suite
from fasim.kernels.validation.decode import mutants as decode
from fasim.kernels.validation.varlen import mutants as varlen

ROOT = Path(suite.__file__).parents[2]
PLACE = ROOT / "traces" / "recorded" / "validation"
README = (PLACE / "README.md").read_text(encoding="utf-8")
RECORDED = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(PLACE.glob("*-[fb][pf]16.json"))}
VALIDATED = tuple(kernel for kernel in subjects.OURS if kernel not in GLUON)
"""Those in Gluon have not been through the suite on a GPU: the README says so, and "auto" takes none of them."""
OURS = [f"{kernel}-{dtype}" for kernel in VALIDATED for dtype in subjects.HALF]
SOURCES = {path: digest for digest, path in map(str.split, (PLACE / "sources.sha256").read_text().splitlines())}
DISPATCH = {"kernels/ops.py", "kernels/arguments.py", "kernels/cuda/launch.py"}
"""What all our kernels are called through; it may be ahead of the reports."""
PEERS = {"fa3-wheel": "FlashAttention-3", "fa4-wheel": "FlashAttention-4", "torch": "PyTorch"}
"""How a peer's reports begin, and the section of the README that explains what fails there."""


def failing(report: dict) -> set[tuple[str, str]]:
    return {(check["group"], check["case"]) for check in report["checks"] if check["verdict"] == "fail"}


def sha256(path: str) -> str:
    return hashlib.sha256((ROOT / path).read_bytes()).hexdigest()


@pytest.mark.parametrize("stem", RECORDED)
def test_a_recorded_report_agrees_with_itself_and_says_where_it_comes_from(stem):
    report = RECORDED[stem]
    assert report["schema"] == "fasim.validation/1" and "H200" in report["device"]
    assert (report["verdict"] == "pass") == (not failing(report))
    counted = Counter((check["group"], check["verdict"]) for check in report["checks"])
    for group in report["groups"]:
        assert all(group.get(verdict, 0) == counted[group["name"], verdict] for verdict in ("pass", "fail", "skip", "note"))
    assert {"torch", "cuda", "driver", "date", "kernel_sha256"} <= report["environment"].keys()
    for check in report["checks"]:
        figures = check["figures"]
        if "max_error" in figures:
            assert figures["max_error"] <= figures["max_error_allowed"] and figures["mean_error"] <= figures["mean_error_allowed"]


def test_no_recording_names_a_path_of_the_machine_it_was_made_on():
    for path in PLACE.iterdir():
        text = path.read_text(encoding="utf-8").replace("/build/fa-fwd/", "")  # where a peer's wheel was built, in its own message
        assert not re.search(r"/(?:work|tmp|build|root|home|opt|usr)/", text), path.name


@pytest.mark.parametrize("stem", OURS)
def test_each_of_our_kernels_passes_every_group_in_both_dtypes(stem):
    report = RECORDED[stem]
    assert report["verdict"] == "pass" and not report["quick"]
    passed = {(check["group"], check["case"]) for check in report["checks"] if check["verdict"] == "pass"}
    assert {group for group, _ in passed} - {"sanitize"} == set(suite.GROUPS)
    assert {("shapes", "batch x heads > 65535"), ("gradients", "batch x heads > 65535")} <= passed
    assert {("shapes", f"more than 2^31 elements: long {which}") for which in "qk"} <= passed


@pytest.mark.parametrize("kernel", VALIDATED)
def test_our_reports_are_of_todays_kernels(kernel):
    files = [path.resolve().relative_to(ROOT).as_posix() for path in subjects.resolve(kernel).sources]
    changed = {path for path in files if sha256(path) != SOURCES[path]}
    assert changed <= DISPATCH, f"{changed - DISPATCH} changed since: validate {kernel} on a GPU again"
    before, _, behind = README.partition(" has changed since")
    assert not changed or all(f"`{path}`" in before[-30:] + behind[:140] for path in changed)
    reported = {RECORDED[f"{kernel}-{dtype}"]["environment"]["kernel_sha256"] for dtype in subjects.HALF}
    assert len(reported) == 1
    assert changed or reported == {subjects.resolve(kernel).source_sha256}


@pytest.mark.parametrize("peer", PEERS)
def test_the_readme_explains_every_check_that_fails_on_a_peer_and_no_other(peer):
    (section,) = (part for part in README.split("\n## ") if part.startswith(PEERS[peer]))
    explained = {tuple(each) for each in re.findall(rf"`({'|'.join(suite.GROUPS)}): ([^`]+)`", section)}
    reports = [report for stem, report in RECORDED.items() if stem.startswith(peer)]
    assert explained == set().union(*map(failing, reports))


@pytest.mark.parametrize("kernel", GLUON)
def test_the_readme_says_which_of_our_kernels_have_no_report(kernel):
    (said,) = re.findall(r"not been through the suite[^.]*", README)
    assert f"`{kernel}`" in said and not any(stem.startswith(kernel) for stem in RECORDED)


def test_every_report_is_ours_or_an_explained_peers():
    assert {stem for stem in RECORDED if not stem.startswith(tuple(PEERS))} == set(OURS)


@pytest.mark.parametrize("stem", RECORDED)
def test_the_readmes_table_says_what_the_report_says(stem):
    count = Counter(check["verdict"] for check in RECORDED[stem]["checks"])
    said = f"{count['fail']} of {count['fail'] + count['pass']} fail" if count["fail"] else f"{count['pass']} pass"
    said += f", {count['skip']} skipped" if count["skip"] else ""
    kernel, _, dtype = stem.rpartition("-")
    (row,) = (line.strip("|").split("|") for line in README.splitlines() if line.startswith(f"| `{kernel}` "))
    assert row[1 if dtype == "fp16" else 2].strip() == said


def test_the_readmes_reproductions_are_python_on_their_own():
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        tree = ast.parse(block)
        assert any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body)
        assert len(block.splitlines()) <= 16


def test_the_suite_rejected_todays_planted_faults_on_the_gpu():
    report = json.loads((PLACE / "self-test-cuda.json").read_text(encoding="utf-8"))
    assert report["verdict"] == "pass" and "H200" in report["device"] and report["groups"] == list(suite.GROUPS)
    killed = {row["mutant"] for row in report["mutants"] if row["killed"]}
    assert killed == {mutant.name for mutant in mutants.MUTANTS}
    assert report["needed_for"].keys() == set(suite.GROUPS) and all(report["needed_for"].values())


@pytest.mark.parametrize("kind", ["decode", "varlen"])
def test_the_suite_rejected_the_planted_faults_of_its_other_kinds_on_the_gpu(kind):
    report = json.loads((PLACE / f"self-test-{kind}-cuda.json").read_text(encoding="utf-8"))
    assert report["verdict"] == "pass" and "H200" in report["device"]
    planted = {"decode": decode.MUTANTS, "varlen": varlen.MUTANTS}[kind]
    assert {row["mutant"] for row in report["mutants"] if row["killed"]} == {mutant.name for mutant in planted}
    assert all(report["needed_for"].values())


def test_what_fails_of_a_peers_decoding_is_what_the_readme_counts():
    report = json.loads((PLACE / "decode-fa3-wheel.json").read_text(encoding="utf-8"))
    count = Counter(check["verdict"] for check in report["checks"])
    assert f"{count['fail']} of {count['fail'] + count['pass']} fail, {count['skip']} skipped" in README
    alone = {case for group, case in failing(report) if group == "parts"}
    layouts = {"dimensions of size 1 with odd strides, 3 parts", "base off 16 bytes, 3 parts"}
    assert alone == {"no keys in 3 parts", "NaN in one part", *layouts}
