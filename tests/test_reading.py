"""The one reader: what a file may not hold is one sentence that names it, whatever it is and however large it would grow."""

from __future__ import annotations

import ast
import gzip
import os
from pathlib import Path

import pytest

import fasim
from fasim.simulator import reading
from fasim.simulator.errors import UsageError
from fasim.simulator.values import Within, name, number, printable, shown, text

ROOT = Path(fasim.__file__).parent


def refused(read, match: str) -> str:
    with pytest.raises(UsageError, match=match) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize(
    ("json", "match"),
    [
        ("", "damaged or cut short"),
        ("1e999", "1e999 is not a finite number"),
        ("[-1e999]", "not a finite number"),
        ("NaN", "NaN is not a number"),
        ("[Infinity]", "Infinity is not a number"),
        ("1" * 5000, "a whole number has 5,000 digits"),
        ("1" * 41, "41 digits"),
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ("[" * 40 + "]" * 40, "nested deeper than 32"),
        ("[" * 100_000 + "]" * 100_000, "nested deeper than 32"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "nested deeper than 32"),
        ("{", "damaged or cut short"),
    ],
)
def test_json_that_no_one_wrote_in_good_faith_is_refused(tmp_path, json, match):
    path = tmp_path / "odd.json"
    path.write_text(json)
    assert str(path) in refused(lambda: reading.read_json(path, "file"), match)


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "bomb.run.json.gz"
    path.write_bytes(gzip.compress(b" " * (reading.MAX_BYTES + 1), 1))
    assert path.stat().st_size < reading.MAX_BYTES // 100
    refused(lambda: reading.read_json(path, "file"), "unpacks to more than")
    monkeypatch.setattr(reading, "MAX_BYTES", 100)  # a gzip of gzips is read member by member, up to the limit all the same
    path.write_bytes(gzip.compress(b" " * 60) * 2)
    refused(lambda: reading.read_json(path, "file"), "unpacks to more than")


def test_what_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    refused(lambda: reading.read_json(path, "file"), "larger than")
    refused(lambda: reading.read_toml(path, "file"), "larger than the 1,048,576 bytes")


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        refused(lambda path=path: reading.read_json(path, "file"), "cannot be read")
    refused(lambda: reading.read_json(Path("a\0b"), "file"), "cannot be read")
    refused(lambda: reading.read_json(tmp_path / ("x" * 300), "file"), "cannot be read")
    refused(lambda: reading.read_json(tmp_path / "none", "file"), "does not exist")


def test_text_is_utf8_with_or_without_a_mark(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"\xef\xbb\xbf[1]")
    assert reading.read_json(path, "file") == [1]
    for data in (b"\xff\xfe[\x001\x00", b"\xc3", b"\xed\xa0\x80"):
        path.write_bytes(data)
        refused(lambda: reading.read_json(path, "file"), "no text")


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("a,b\n1\n", "1 of 2 columns"),
        ("a,,\n1,2,3\n", "2 columns of the name ''"),
        ("a,a\n1,2\n", "2 columns of the name 'a'"),
        ("a\n" + "x" * (reading.MAX_CELL + 1), "at most 131,072"),
        ('a\n"x', "damaged"),
        ('a\n"x"y', "damaged"),
    ],
)
def test_a_table_that_is_none_is_refused(table, match):
    refused(lambda: reading.parse_csv(table, "table"), match)


def test_no_control_character_is_shown_as_it_is():
    assert printable("H200 日本 é") == "H200 日本 é"
    assert printable("\x1b[31m\x9b\x07\u202e\u200b\udcff\n") == r"\x1b[31m\x9b\x07\u202e\u200b\udcff\n"
    assert printable(printable("\x1b")) == printable("\x1b")


def test_a_value_is_shown_short_whatever_it_is():
    for value in (10**5000, "x" * 10**6, [1] * 10**6, {"a": [0] * 10**5}, -(2**200), "\x1b" * 1000, 1.5, None):
        assert len(shown(value)) < 80 and shown(value).isprintable()


def test_a_number_is_of_its_kind_and_within_its_range():
    assert number(3, float, Within(0, 5), "x") == 3.0 and type(number(3, float, Within(0, 5), "x")) is float
    odd = ((True, int), (3.0, int), ("3", int), (6, int), (-1, int), (float("nan"), float), (10**400, float), (None, int))
    for value, kind in odd:
        refused(lambda value=value, kind=kind: number(value, kind, Within(0, 5), "x"), "^x is .*, expected a .*number from 0 to 5$")


def test_a_name_is_no_path():
    for good in ("h200", "NVIDIA H200 SXM", "my.gpu-2", "日本"):
        assert name(good, "x") == good
    for bad in ("", "/a", "a/b", "a\\b", "..", "a.toml", "a.TOML", "x" * 65, "a\nb", 7):
        refused(lambda bad=bad: name(bad, "x"), "^x (is|has) ")
    refused(lambda: text("a\tb", "x"), r"U\+0009")


# -- and nothing else reads ---------------------------------------------------------------------------------------------

PARSERS = {
    *("json.load", "json.loads", "json.JSONDecoder", "tomllib.load", "tomllib.loads", "csv.reader", "csv.DictReader"),
    *("gzip.open", "gzip.decompress", "gzip.GzipFile", "zlib.decompress", "pickle.load", "pickle.loads", "eval", "exec"),
}
READER = "simulator/reading.py"
RUN = {("simulator/schedules/own.py", "exec")}
"""A user's own schedule is Python, and is run as such."""


def test_every_file_from_outside_goes_through_the_reader():
    """No module but the reader parses JSON, TOML, CSV or gzip, whatever it calls them."""
    found = set()
    for path in sorted(ROOT.rglob("*.py")):
        place = str(path.relative_to(ROOT))
        if place.startswith(("tests", ".")) or place == READER:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.asname or alias.name: alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, (ast.Attribute, ast.Name)):
                head, _, tail = ast.unparse(node).partition(".")
                called = f"{names.get(head, head)}.{tail}".rstrip(".")
                if called in PARSERS:
                    found.add((place, called))
    assert found == RUN
