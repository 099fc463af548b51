"""No file gives a traceback, a hang or more than 2 GB: runs, devices, plans and tables of counters."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import fuzz
import pytest
from fuzz import VALUES, answer_or_sentence, bounded, command_line, examples, spliced, spoiled
from hypothesis import given
from hypothesis import strategies as st

from fasim.kernels.measure import plan
from fasim.simulator.devices.device import FIELDS, load_device
from fasim.simulator.schedules import SCHEDULES
from fasim.traces import nsight, store


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    with fuzz.cheap(monkeypatch):
        yield


@pytest.fixture
def recording(tmp_path, pingpong_run) -> dict:
    """The document of a small run with spans."""
    store.save(pingpong_run, tmp_path / "a.run.json")
    return json.loads((tmp_path / "a.run.json").read_text())


def sealed(document: dict, body: object) -> str:
    """The document with another body, and the checksum that fits it."""
    return json.dumps(document | {"run": body, "sha256": store._checksum(body)})


@examples(600)
@given(data=st.data())
def test_no_run_file_is_more_than_a_sentence(tmp_path, recording, data):
    path = tmp_path / "odd.run.json"
    path.write_text(sealed(recording, data.draw(spoiled(recording["run"]))))
    run = answer_or_sentence("run files", store.load, path)
    if run is not None:
        with bounded(path):
            json.dumps(run.to_dict(), allow_nan=False)
            assert store.file_name(run).endswith(store.SUFFIXES)


@examples(100)
@given(data=st.data())
def test_no_measured_run_is_more_than_a_sentence_beside_its_prediction(tmp_path, data):
    document = json.loads((store.RECORDED / "fa3-cuda-b1h16s512d128-fp16-sustained.run.json").read_text())
    document["run"]["workload"] |= {"heads": 1, "kv_heads": 1}
    path = tmp_path / "odd.run.json"
    path.write_text(sealed(document, data.draw(spoiled(document["run"]))))
    command_line("measured runs", ["compare", str(path), *data.draw(st.sampled_from(([], ["--json"], ["--markdown"])))])


JSON_TOKENS = (
    b"[" * 50, b"{", b"}", b'"', b"1e999", b"NaN", b"9" * 5000, b"\\ud800", b"\xef\xbb\xbf", b"\xff", b"\0", b"null", b",",
    b'"run":',
)  # fmt: skip


@examples(300)
@given(data=st.data())
def test_no_bytes_of_a_run_file_are_more_than_a_sentence(tmp_path, recording, data):
    text = data.draw(spliced(json.dumps(recording).encode(), JSON_TOKENS))
    packed = gzip.compress(text, 1)
    path = tmp_path / "odd.run.json.gz"
    path.write_bytes(data.draw(st.sampled_from((text, packed, packed[: len(packed) // 2]))))
    answer_or_sentence("run files by bytes", store.load, path)


TOML_TOKENS = (
    b"[" * 3000, b"{a=" * 2000, b"]", b"[[a]]\n", b"[chip]\n", b"\n", b"=", b'"', b'"""', b"nan", b"inf", b"-", b"0", b"9" * 5000,
    b"1e-12", b"1e308", b"1979-05-27", b"a." * 3000, b"#", b"\xef\xbb\xbf", b"\xff", b"\0", b"\\u001b", b"true", b"{}", b"[]",
)  # fmt: skip


def device_text(changes: dict[str, object]) -> str:
    """An H200 with these fields changed."""
    entries = ((name, json.dumps(value), FIELDS[name].metadata["unit"]) for name, value in changes.items())
    return 'base = "h200"\n' + "".join(f'{name} = {{value = {v}, unit = "{unit}", source = "s"}}\n' for name, v, unit in entries)


@examples(200)
@given(data=st.data())
def test_no_device_file_is_more_than_a_sentence(tmp_path, data):
    scalars = VALUES.filter(lambda value: not isinstance(value, (dict, type(None))))
    text = device_text(data.draw(st.dictionaries(st.sampled_from(sorted(FIELDS)), scalars, max_size=2))).encode()
    if data.draw(st.booleans()):
        text = data.draw(spliced(text, TOML_TOKENS))
    path = tmp_path / "odd.toml"
    path.write_bytes(text)
    answer_or_sentence("device files", load_device, str(path))


@st.composite
def extreme(draw) -> dict[str, object]:
    """One to eight fields of a device at, or near, an end of their range."""
    changes = {}
    for name in draw(st.lists(st.sampled_from([n for n, f in FIELDS.items() if "within" in f.metadata]), min_size=1, max_size=8)):
        least, most = FIELDS[name].metadata["within"]
        end = draw(st.sampled_from((least, most, (least * most) ** 0.5, least + (most - least) / 1000)))
        changes[name] = int(end) if FIELDS[name].type == "int" else float(end)
    return changes


OPTIONS = ("--batch", "1", "--heads", "2", "--seqlen", "300")


@examples(100)
@given(
    changes=extreme(),
    schedule=st.sampled_from(sorted(SCHEDULES)),
    options=st.sampled_from((OPTIONS, (*OPTIONS, "--causal"), (*OPTIONS, "--regime", "burst"))),
)
def test_no_device_that_is_possible_breaks_a_prediction(tmp_path, changes, schedule, options):
    path = tmp_path / "extreme.toml"
    path.write_text(device_text(changes))
    command_line("devices at their limits", ["predict", schedule, "--device", str(path), *options])


PLAN = {"kernels": "fa3", "seqlen": [512, 1024], "head_dim": [64, 128], "causal": [False, True], "tokens": 8192, "hidden": 256}
PLAN_TOKENS = (*TOML_TOKENS, b"seqlen = 1\n", b"kernels = 3\n", b"hidden = 0\n", b"batch = [1, 2]\n", b"runs = [1]\n")


def plan_text(block: dict) -> bytes:
    """A plan of one block; TOML has no null."""
    lines = [f"{json.dumps(name)} = {json.dumps(value)}\n" for name, value in block.items()]
    return ("[[runs]]\n" + "".join(lines)).encode()


@examples(400)
@given(data=st.data())
def test_no_plan_is_more_than_a_sentence(tmp_path, data):
    path = tmp_path / "odd.toml"
    more = data.draw(st.sampled_from(({}, {"heads_per_kv": 4}, {"batch": 1, "heads": 2})))
    text = plan_text(data.draw(spoiled(PLAN | more)))
    path.write_bytes(data.draw(st.one_of(st.just(text), st.just(text), spliced(text, PLAN_TOKENS))))
    found = answer_or_sentence("plans", plan.read, path)
    assert found is None or 0 < len(found) <= plan.MAX_ENTRIES


CSV = (Path(__file__).parent / "data" / "ncu_h200.csv").read_bytes()[:6000].rpartition(b"\n")[0]
CSV_TOKENS = (
    b'"', b",", b"\n", b'"ID"', b"12,5", b"1e999", b"n/a", b"MB", b"x" * 140_000, b"\xef\xbb\xbf", b"\xff", b"\0", b'""', b"-",
    b"==ERROR== \x1b[2J\n",
)  # fmt: skip


@examples(500)
@given(data=st.data())
def test_no_table_of_counters_is_more_than_a_sentence(data):
    text = data.draw(spliced(CSV, CSV_TOKENS)).decode("utf-8", "replace")
    found = answer_or_sentence("tables of counters", nsight.parse, text)
    for kernel in found or ():
        assert kernel.name.isprintable() and all(abs(value) <= 1e300 for value in kernel.metrics.values())


def test_the_counts_of_files(capsys):
    fuzz.told(capsys)
