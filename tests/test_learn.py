"""The course: every lesson builds, every question can be answered rightly and wrongly, and no number in a text is typed in."""

from __future__ import annotations

import io
import json
import math
import os
import re
from pathlib import Path

import pytest

import fasim as package
from fasim.cli.keys import TerminalKeys
from fasim.cli.learn.session import Session, run_through
from fasim.cli.output import stdout
from fasim.simulator.devices.device import load_device
from fasim.simulator.errors import UsageError
from fasim.simulator.results import metrics
from fasim.traces.lessons import LESSONS, Course, answers, find_lesson, parts, progress
from fasim.traces.lessons.why_slow import LADDER

DEVICES = ("h200", "h100-sxm")
ROOT = Path(package.__file__).parent
NAMES = re.compile(
    r"`[^`]*`|FlashAttention-?\d|\bfp(16|32|64|8)\b|\bFP8\b|\be4m3\b|\b[HA][12]00\b|\bWG\d|\bL[12]\b|\bNumPy\b|\b[mS]_?\d\b"
)
"""What has a digit in it and is a name."""


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    """Progress goes where no one's own is."""
    monkeypatch.setenv("FASIM_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state" / "learn.json"


@pytest.fixture(scope="module")
def courses() -> dict[str, Course]:
    return {name: Course(load_device(name)) for name in DEVICES}


@pytest.fixture(scope="module")
def without_tma() -> Course:
    return Course(load_device("a100-sxm"))


@pytest.fixture(scope="module")
def built(courses) -> dict[tuple[str, str], parts.Lesson]:
    return {(entry.name, name): entry.build(course) for entry in LESSONS for name, course in courses.items()}


def texts(lesson: parts.Lesson):
    """Every text of a lesson that a reader sees, with its numbers."""
    for section in lesson.sections:
        yield parts.Say(section.title)
        for part in section.parts:
            if isinstance(part, parts.Say):
                yield part
            elif isinstance(part, parts.Question):
                yield from (part.ask, part.hint, part.why)
            elif isinstance(part, parts.Walk):
                yield from (frame.caption for frame in part.frames)
            else:
                yield from (each for each in (getattr(part, "caption", None), getattr(part, "note", None)) if each)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("entry", LESSONS, ids=lambda entry: entry.name)
def test_every_question_is_answered_rightly_and_wrongly(entry, device, built):
    lesson = built[entry.name, device]
    assert 2 <= len(lesson.questions) <= 4
    for question in lesson.questions:
        right = question.answer
        assert math.isfinite(right)
        assert answers.check(question, f"{right:.12g}").right
        assert answers.check(question, f"{right * (1 + 0.9 * question.tolerance):.12g} {question.unit}").right
        assert not answers.check(question, f"{right * (1 + 1.1 * question.tolerance):.12g}").right
        assert not answers.check(question, f"{-right - 1:.12g}").right
        assert 0 < question.tolerance <= 0.1


@pytest.mark.parametrize("entry", LESSONS, ids=lambda entry: entry.name)
def test_no_number_in_a_text_is_typed_in(entry, built):
    for device in DEVICES:
        for text in texts(built[entry.name, device]):
            assert not re.search(r"\d", NAMES.sub("", text.template)), text.template
            places = {name.partition(":")[0] for name in re.findall(r"{(\w+)}", text.template)}
            assert places == set(text.numbers), text.template


@pytest.mark.parametrize("entry", LESSONS, ids=lambda entry: entry.name)
def test_a_lesson_is_printed_within_eighty_columns_and_is_plain_json(entry, built, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for device in DEVICES:
        lesson = built[entry.name, device]
        run_through(stdout(), lesson)
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        assert "\x1b" not in "".join(lines)
        assert json.loads(json.dumps(lesson.to_dict(), allow_nan=False))["device"] == device


@pytest.mark.parametrize("entry", LESSONS, ids=lambda entry: entry.name)
def test_a_device_that_is_no_hopper_has_the_lesson_or_one_sentence(entry, without_tma):
    try:
        lesson = entry.build(without_tma)
    except UsageError as refused:
        needed = getattr(entry.module, "NEEDS", "")
        said = f"lesson {entry.title!r} is about {needed}, which a100-sxm does not have; use --device h200"
        assert needed and str(refused) == said
        return
    assert all(answers.check(question, f"{question.answer:.12g}").right for question in lesson.questions)
    if entry.name != "hardware":  # whose recordings are of an H200
        assert "fa3" not in json.dumps(lesson.to_dict()["sections"])


def test_what_a_lesson_tells_to_read_is_there():
    for entry in LESSONS:
        for path, _ in entry.module.READING.code:
            assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("device", DEVICES)
def test_the_first_lessons_ladder_falls_in_time_and_in_bytes(device, courses):
    runs = courses[device].runs(*LADDER)
    times = [metrics.time_s(run) for run in runs]
    moved = [run.traffic.total("hbm_read") + run.traffic.total("hbm_write") for run in runs]
    assert times == sorted(times, reverse=True)
    assert moved == sorted(moved, reverse=True)
    scores = 4 * courses[device].standard_bytes
    assert moved[0] > scores > 0.9 * moved[0], "S and P are what standard attention moves"


# -- answers and progress -------------------------------------------------------------------------------------------------

ASKED = parts.Question(parts.say("how many"), 8.59, "GB", 0.01, parts.say("hint"), parts.say("why"))


@pytest.mark.parametrize("text", ["8.59", "8.6 GB", "8.6gb", " 4*16*8192**2*2/1e9 ", "8.59e0", "8192^2*128/1e9", "+8.59"])
def test_an_answer_may_be_a_number_or_what_computes_it(text):
    assert answers.check(ASKED, text).right


NO_NUMBERS = ["", "many", "8,6", "9**9**9**9", "__import__('os')", "1/0", "nan", "1e999", "(" * 300, "8.6 MB", "True"]


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_what_is_no_number_is_said_so(text):
    with pytest.raises(UsageError, match="number|comma"):
        answers.check(ASKED, text)


DAMAGED = [b"", b"{", b"[]", b'{"answered": 3}', b"\xff\xfe", b'{"answered": {"a": ["x"]}, "questions": {}}', b"[" * 9000]


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_progress_is_no_progress_and_no_error(content, state, fasim):
    state.parent.mkdir()
    state.write_bytes(content)
    assert progress.load() == progress.Progress({}, {})
    assert fasim("learn", "--list")[0] == 0
    assert progress.keep("why-slow", 2, 4)
    assert progress.load().done("why-slow") == 1


def test_progress_that_cannot_be_kept_costs_no_answer(state, fasim, built):
    state.parent.write_text("a file where the folder would be")
    answer = built["why-slow", "h200"].questions[0].answer
    assert fasim("learn", "1", "--answer", f"1={answer}")[0] == 0


# -- the command ----------------------------------------------------------------------------------------------------------


def test_a_lesson_without_a_terminal_is_answered_by_option_and_by_stdin(fasim, built, monkeypatch):
    first, second, *_ = built["why-slow", "h200"].questions
    status, out, _ = fasim("learn", "1")
    assert status == 0 and "Question 1" in out and "--answer 1=" in out
    status, out, _ = fasim("learn", "why-slow", "--answer", f"1={first.answer}", "--answer", "2=1")
    assert status == 1 and "Right." in out and "Not yet." in out
    monkeypatch.setattr("sys.stdin", io.StringIO(f"2 = {second.answer} {second.unit}\n\n"))
    status, out, _ = fasim("learn", "1", "--answer", "-", "--json")
    assert (status, json.loads(out)) == (0, [{"question": 2, "given": pytest.approx(second.answer), "right": True}])
    assert "2 of" in fasim("learn")[1]
    assert json.loads(fasim("learn", "--json")[1])[0]["answered"] == 2


@pytest.mark.parametrize(
    "tokens",
    [("99",), ("why-slwo",), ("--answer", "1=2"), ("1", "--answer", "2"), ("1", "--answer", "9=2"), ("1", "--list"),
     ("1", "--device", "h300"), ("1", "--answer", "1=many")],
)  # fmt: skip
def test_a_wrong_question_gets_one_sentence(tokens, fasim):
    status, out, err = fasim("learn", *tokens)
    assert status == 2 and not out and err.startswith("fasim: ") and err.count("\n") == 1


def test_a_lesson_is_found_by_number_and_by_name():
    assert all(find_lesson(str(entry.number)) is find_lesson(entry.name) is entry for entry in LESSONS)


# -- in a terminal --------------------------------------------------------------------------------------------------------


class Pressed:
    """A reader who presses these keys and types these lines, then leaves."""

    def __init__(self, keys: str = "", lines: tuple[str, ...] = ()):
        self.keys, self.lines = list(keys), list(lines)

    def key(self) -> str:
        return self.keys.pop(0) if self.keys else "q"

    def line(self) -> str | None:
        return self.lines.pop(0) if self.lines else None


def read(lesson: parts.Lesson, capsys, keys: Pressed) -> tuple[bool, str]:
    console = stdout(80)
    console.height = 500  # no pauses but those asked for
    finished = Session(console, keys).read(lesson)
    return finished, capsys.readouterr().out


def test_a_reader_finishes_a_lesson_with_hints_and_wrong_answers(built, capsys):
    lesson = built["why-slow", "h200"]
    lines = ["?", "rubbish", "1", *(f"{question.answer}" for question in lesson.questions)]
    keys = Pressed()
    keys.key = lambda: "enter"
    keys.lines = lines
    finished, out = read(lesson, capsys, keys)
    assert finished and out.count("Right.") == len(lesson.questions) and "Not yet." in out and "is not a number" in out
    assert progress.load().answered["why-slow"] == frozenset(range(1, len(lesson.questions) + 1))


@pytest.mark.parametrize("name", ["tiling", "roofline", "overlap", "own-schedule"])
def test_nothing_scrolls_off_a_small_screen_before_it_was_read(name, built, capsys):
    console, high = stdout(80), 24
    console.height = high
    lesson, read_so_far = built[name, "h200"], []

    def key() -> str:
        read_so_far.append(capsys.readouterr().out)
        return "enter"

    keys = Pressed(lines=("",) * 9)
    keys.key = key
    assert Session(console, keys).read(lesson)
    whole = "".join(read_so_far) + capsys.readouterr().out
    assert all(text.count("\n") <= high for text in read_so_far)
    assert all(section.title in whole for section in lesson.sections) and "Read on" in whole


def test_a_reader_may_leave_anywhere(built, capsys):
    assert not read(built["why-slow", "h200"], capsys, Pressed())[0]
    assert not read(built["why-slow", "h200"], capsys, Pressed(lines=("q",)))[0]


def test_keys_step_through_a_timeline_block_by_block_and_back(built, capsys):
    lesson = built["pingpong", "h200"]
    finished, out = read(lesson, capsys, Pressed("npp" + "pn"))
    assert not finished
    drawn = [block.splitlines()[0] for block in out.split("\nWG0 ")[1:]]
    assert len(drawn) >= 3 and drawn[0] != drawn[1] and drawn[0] == drawn[2], "one on, one back"


def test_keys_step_through_a_walk_and_pages_go_back(built, capsys):
    out = read(built["tiling", "h200"], capsys, Pressed("nn", ("",)))[1]
    assert "1 of 11" in out and "2 of 11" in out and "3 of 11" in out and "4 of 11" not in out
    lesson, keys = built["why-slow", "h200"], Pressed(lines=("",) * 9)
    turned = iter(["enter", "b", "q"])
    keys.key = lambda: next(turned)
    out = read(lesson, capsys, keys)[1]
    assert re.findall(r"page (\d) of", out) == ["1", "2", "1"]


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="this system has no pseudo-terminals")
def test_keys_of_a_terminal_are_heard_as_they_are_pressed():
    main, terminal = os.openpty()
    keys = TerminalKeys(terminal)
    pressed = {b"n": "n", b"\x1b[C": "n", b"\x1b[A": "p", b"\r": "enter", b"Q": "q", b"\xc3\xa9": "\u00e9"}
    pressed |= {b"\x1b": "escape", b"\x04": "q"}
    for typed, meant in pressed.items():
        os.write(main, typed)
        assert keys.key() == meant
    os.write(main, b"8.6 GB\n")
    assert keys.line() == "8.6 GB"
    os.close(main)
    os.close(terminal)


def test_keys_of_what_is_no_terminal_are_lines_and_its_end_is_quit(tmp_path):
    (tmp_path / "typed").write_bytes(b"next\n\n8.6")
    with open(tmp_path / "typed", "rb") as typed:
        keys = TerminalKeys(typed.fileno())
        assert [keys.key(), keys.key(), keys.line(), keys.line(), keys.key()] == ["n", "enter", "8.6", None, "q"]
