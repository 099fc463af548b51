"""The course as pages: complete, small, on its own; and in a real browser, what a reader points at, drags, plays and answers."""

from __future__ import annotations

import json
import math
import re

import pytest
from browser import started

from fasim.cli.site import build, drawn
from fasim.cli.site.page import page
from fasim.simulator.devices.device import load_device
from fasim.simulator.errors import UsageError
from fasim.simulator.units import scaled
from fasim.traces import store
from fasim.traces.lessons import LESSONS, Course, answers, parts
from fasim.traces.walk import walk
from fasim.traces.window import by_iterations

MOST_BYTES = 5_000_000
PAGES = ("index.html", "timelines.html", "walk.html", *(f"{entry.number:02}-{entry.name}.html" for entry in LESSONS))


@pytest.fixture(scope="module")
def course() -> Course:
    return Course(load_device("h200"))


@pytest.fixture(scope="module")
def files(course) -> dict[str, str]:
    return build.site(course)


@pytest.fixture(scope="module")
def folder(files, tmp_path_factory):
    """The site as it lies on a disk."""
    place = tmp_path_factory.mktemp("site")
    for name, text in files.items():
        (place / name).write_text(text, encoding="utf-8")
    return place


def data_of(page: str) -> dict:
    return json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])


# -- the files ------------------------------------------------------------------------------------------------------------


def test_the_site_is_complete_and_small_and_names_no_other_place(files):
    assert set(PAGES) <= files.keys()
    assert sum(len(text.encode()) for text in files.values()) < MOST_BYTES
    for name, text in files.items():
        assert "://" not in text, name
        for link in re.findall(r'(?:href|src)="([^"]*)"', text):
            assert link in files or link == "data:,", f"{name} points at {link}"


def test_every_question_is_on_its_page_with_the_models_answer(files, course):
    for entry in LESSONS:
        page = files[f"{entry.number:02}-{entry.name}.html"]
        questions = entry.build(course).questions
        assert page.count('class="question"') == len(questions)
        shown = data_of(page)["questions"]
        assert [shown[str(n)]["answer"] for n in range(1, len(questions) + 1)] == [question.answer for question in questions]


def test_a_timelines_data_are_the_spans_of_the_run(course):
    run = course.timeline("pingpong")
    data = drawn.timeline(run, by_iterations(run, 1, 3))
    (panel,) = data["panels"]
    rows = {row["name"]: row["spans"] for row in panel["rows"]}
    cores = next(n for n, lane in enumerate(run.lanes) if lane.name == "tensor cores")
    mine = run.spans[run.spans["lane"] == cores]
    assert sum(span[1] for span in rows["tensor cores"]) == int((mine["end"] - mine["start"]).sum())
    assert data["labels"][rows["tensor cores"][0][2]][0] == "S=QK^T"
    loads = {copy.label: [copy.way, copy.l2, copy.hbm] for copy in run.sample.copies}
    assert panel["copies"] == loads and loads["load K"][1] == run.tile.block_n * 128 * 2


def test_nothing_in_the_data_is_taken_for_a_tag():
    made = page("<b>", "", {"label": "</script><script>alert(1)</script><!--"})
    assert made.count("</script>") == 1 + 1 + 4 and "<title>&lt;b&gt;</title>" in made
    assert data_of(made) == {"label": "</script><script>alert(1)</script><!--"}


def test_a_walks_data_are_its_steps_and_sums(course):
    found = course.walks("fa1")
    for told, each in zip(drawn.walks(found)["walks"], found, strict=True):
        sums = [sum(told["patterns"][step[4]]["bytes"][level] for step in told["steps"]) for level in range(5)]
        assert tuple(sums) == each.so_far[-1]


def test_what_a_device_cannot_do_is_one_sentence_on_its_page():
    files = build.site(Course(load_device("a100-sxm")))
    assert set(PAGES) <= files.keys()
    assert "is about TMA and WGMMA, which a100-sxm does not have" in files["09-pingpong.html"]
    assert 'class="question"' not in files["09-pingpong.html"] and 'class="question"' in files["03-tiling.html"]
    assert {walk["schedule"] for walk in data_of(files["walk.html"])["walks"]["w"]["walks"]} == {"standard", "fa1", "fa2"}


def test_a_timeline_is_one_file_that_needs_no_other(fasim, tmp_path):
    small = ("--batch", "1", "--heads", "4", "--seqlen", "1024")
    for tokens in (("pingpong",), ("pingpong", "fa3"), ("standard", "--kernel", "1")):
        status, _, err = fasim("timeline", *tokens, *small, "--html", str(tmp_path / "t.html"))
        page = (tmp_path / "t.html").read_text(encoding="utf-8")
        assert status == 0 and "wrote" in err
        assert not re.findall(r'(?:href|src)="(?!data:,)', page) and "://" not in page
        assert len(data_of(page)["timelines"]["t"]["panels"]) == (2 if "fa3" in tokens else 1)
    assert fasim("timeline", *small, "--html", "x", "--svg", "x")[0] == 2


def test_a_recorded_timeline_is_a_page_under_its_prediction(fasim, tmp_path):
    recorded = store.TIMELINES / "fa3-cuda-b16h16s1024d128-fp16-causal-burst.run.json.gz"
    assert fasim("compare", "--timeline", str(recorded), "--html", str(tmp_path / "t.html"))[0] == 0
    (panel,) = data_of((tmp_path / "t.html").read_text(encoding="utf-8"))["timelines"]["t"]["panels"]
    assert {"WG0", "WG0 measured", "WG1", "WG1 measured"} <= {row["name"] for row in panel["rows"]}
    assert fasim("compare", "--html", "x.html")[0] == 2, "it draws timelines"


@pytest.mark.parametrize("tokens", [("1",), ("--list",), ("--json",), ("--answer", "1=2")])
def test_the_course_is_written_whole(fasim, tmp_path, tokens):
    status, out, err = fasim("learn", *tokens, "--html", str(tmp_path / "none"))
    assert status == 2 and not out and err.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(fasim, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = fasim("learn", "--html", str(tmp_path / "file" / "site"))
    assert status == 2 and err.count("\n") == 1


# -- in a browser ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with started() as found:
        yield found


class Reader:
    """One reader's window, and whatever the browser complained about."""

    def __init__(self, browser, folder, **options):
        self.folder, self.complaints = folder, []
        self.context = browser.new_context(**{"viewport": {"width": 1100, "height": 900}, **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(5000)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("requestfailed", lambda request: self.complaints.append(request.url))
        self.page.on("request", lambda request: self._asked(request.url))

    def _asked(self, url: str) -> None:
        if not url.startswith(("file:", "data:")):
            self.complaints.append(url)

    def open(self, name: str):
        self.page.goto((self.folder / name).as_uri())
        return self.page


@pytest.fixture
def reader(browser, folder):
    found = Reader(browser, folder)
    yield found
    found.context.close()
    assert not found.complaints


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_opens_without_a_complaint_and_fits_a_phone(browser, folder, scheme):
    found = Reader(browser, folder, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    for name in PAGES:
        page = found.open(name)
        wide, paper, drawn_in = page.evaluate(
            """() => [document.documentElement.scrollWidth, getComputedStyle(document.body).backgroundColor,
                      [...document.querySelectorAll("canvas")].every((each) => each.width > 0 && each.height > 40)]"""
        )
        assert wide <= 360, f"{name} is {wide} pixels wide"
        assert (paper == "rgb(255, 255, 255)") is (scheme == "light")
        assert drawn_in, name
    assert not found.complaints
    found.context.close()


def view(page, number: int = 0) -> tuple[int, int]:
    return tuple(map(int, page.locator(".timeline").nth(number).get_attribute("data-view").split("-")))


def point(canvas, row: int, span: list[int], view: tuple[int, int]) -> tuple[float, float]:
    """Where the middle of a span is on the screen, scrolled there."""
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    left, right, top = canvas.evaluate("(each, row) => [...each.edges, each.tops[row]]", row)
    x = left + (span[0] + span[1] / 2 - view[0]) / (view[1] - view[0]) * (right - left)
    return box["x"] + x, box["y"] + top + 10


def test_a_timeline_zooms_moves_scrubs_and_tells_what_is_under_the_pointer(reader, course):
    page = reader.open("timelines.html")
    first = page.locator(".timeline").first
    assert first.locator("canvas").count() == len(build.IDEAS)
    start, end = view(page)
    first.get_by_role("button", name="zoom in").click()
    zoomed = view(page)
    assert start < zoomed[0] < zoomed[1] < end
    first.locator("canvas").first.press("ArrowRight")
    assert view(page)[0] > zoomed[0]
    first.get_by_role("button", name="all that was recorded").click()
    assert view(page)[0] == 0 and view(page)[1] > 2 * end

    data = data_of((reader.folder / "timelines.html").read_text(encoding="utf-8"))["timelines"]["t0"]
    panel = data["panels"][1]
    cores = next(row for row in panel["rows"] if row["name"] == "tensor cores")
    span = next(each for each in cores["spans"] if each[1] > 200 and each[3] == 3)
    first.get_by_label("cycle", exact=True).last.fill(str(span[0] + 50))
    said = first.locator("dl div", has_text="pingpong tensor cores").locator("dd").inner_text()
    assert said == f"{data['labels'][span[2]][0]} [3]"
    assert first.get_attribute("data-cursor") == str(span[0] + 50)

    x, y = point(first.locator("canvas").nth(1), panel["rows"].index(cores), span, view(page))
    page.mouse.move(x, y)
    tip = first.locator(".tip").inner_text()
    assert tip.startswith(said) and f"{span[1]:,}" in tip

    first.get_by_role("button", name="zoom in").click()
    before = view(page)
    x, y = point(first.locator("canvas").nth(1), 0, span, before)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 100, y, steps=3)
    page.mouse.up()
    assert view(page)[0] > before[0], "dragged to the left, later cycles come"


def test_bytes_of_a_load_are_told(reader):
    page = reader.open("09-pingpong.html")
    data = data_of((reader.folder / "09-pingpong.html").read_text(encoding="utf-8"))["timelines"]["t1"]
    rows = data["panels"][0]["rows"]
    number = next(n for n, row in enumerate(rows) if row["name"] == "TMA")
    start, end = view(page)
    span = next(each for each in rows[number]["spans"] if start < each[0] and each[0] + each[1] < end)
    page.mouse.move(*point(page.locator(".timeline canvas"), number, span, (start, end)))
    assert "32.8 kB read" in page.locator(".tip").inner_text()


def test_a_walk_steps_plays_and_counts_with_every_block_size(reader, course):
    page = reader.open("walk.html")
    host = page.locator(".walk")
    for schedule in build.WALKED:
        host.get_by_label("schedule").select_option(schedule)
        walks = {each.tile.block_n if schedule == "fa1" else each.tile.block_m: each for each in course.walks(schedule)}
        size = host.get_by_label("block size")
        assert int(size.get_attribute("max")) == len(walks) - 1
        for place, found in enumerate(walks[key] for key in sorted(walks)):
            size.fill(str(place))
            assert host.get_attribute("data-step") == "0"
            host.get_by_label("step", exact=True).fill(str(len(found.steps) - 1))
            assert host.get_attribute("data-total") == " ".join(map(str, found.so_far[-1]))
    host.locator(".bars button").first.click()
    smallest = min(course.walks("fa3"), key=lambda each: each.tile.block_m)
    assert f"{smallest.tile.block_m} queries" in host.locator("output").first.inner_text()
    assert host.locator(".bars .value").first.inner_text() == scaled(smallest.totals["L2 to SRAM"], "B")
    usual = walk(course._walked(True), "fa3", "h200")
    host.get_by_label("causal").check()
    size.fill("1")
    host.get_by_role("button", name="step on").click()
    host.get_by_role("button", name="step on").click()
    assert host.get_attribute("data-total") == " ".join(map(str, usual.so_far[2]))
    host.get_by_role("button", name="step back").click()
    assert host.get_attribute("data-step") == "1"
    host.get_by_role("button", name="play").click()
    page.wait_for_function("() => Number(document.querySelector('.walk').dataset.step) > 2")
    host.get_by_role("button", name="stop").click()


def test_a_question_is_judged_as_in_the_terminal_and_what_is_solved_is_kept(reader, course):
    lesson = LESSONS[0].build(course)
    page = reader.open("01-why-slow.html")
    for number, question in enumerate(lesson.questions[:2]):
        form = page.locator(".question").nth(number)
        form.get_by_role("textbox").fill(f"{question.answer * 1.2}")
        form.get_by_role("button", name="check").click()
        assert form.locator(".verdict").inner_text().startswith("Not yet.")
        form.get_by_role("textbox").fill(f"{question.answer / 8} * 2^3 {question.unit}")
        form.get_by_role("textbox").press("Enter")
        assert form.locator(".verdict").inner_text().startswith("Right.")
    form.get_by_role("textbox").fill("many")
    form.get_by_role("button", name="check").click()
    assert form.locator(".verdict").inner_text().startswith("No number.")
    form.get_by_role("button", name="show").click()
    assert form.locator(".verdict").inner_text().startswith("It is")
    assert reader.open("index.html").locator("[data-kept=why-slow]").inner_text() == f"2 of {len(lesson.questions)}"
    assert reader.open("01-why-slow.html").locator(".question.right").count() == 2


SAID = ["8.59", "8.6 GB", "8.6gb", " 4*16*8192**2*2/1e9 ", "8192^2*128/1e9", "+8.59", "8,600", "5%"]
SAID += ["-2**2", "2**-1", "2**3**2", "(1+2)*3", "2-3-4", "8/4/2", ".5e1"]
NO_NUMBERS = ["", "many", "8,6", "1/0", "nan", "(1", "1+", "8.6 MB", "1e999", "2 3", "__import__('os')"]


def test_the_page_reads_answers_as_the_command_does(reader):
    page = reader.open("01-why-slow.html")
    for text in SAID:
        assert math.isclose(page.evaluate("(text) => fasim.answer(text, 'GB')", text), answers.read(text, "GB")), text
    for text in NO_NUMBERS:
        with pytest.raises(UsageError):
            answers.read(text, "GB")
        assert page.evaluate("(text) => Number.isNaN(fasim.answer(text, 'GB'))", text), text


def test_moments_of_a_small_matrix_step(reader, course):
    page = reader.open("03-tiling.html")
    frames = page.locator(".frames")
    part = next(each for section in LESSONS[2].build(course).sections for each in section.parts if isinstance(each, parts.Walk))
    frames.get_by_role("button", name="step on").click()
    assert frames.get_attribute("data-frame") == "1"
    assert frames.locator(".cells i[data-sign='#']").count() == 1
    for _ in part.frames:
        frames.get_by_role("button", name="step on").click()
    assert frames.get_attribute("data-frame") == str(len(part.frames) - 1)


def test_the_theme_is_the_systems_until_the_reader_chooses(reader):
    page = reader.open("index.html")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.get_by_role("button", name="dark page").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert reader.open("walk.html").evaluate("document.documentElement.dataset.theme") == "dark"
