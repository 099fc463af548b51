"""A sweep's rows as lines: what is plotted over what, in characters and as a picture."""

from __future__ import annotations

import pytest

from fasim.simulator.errors import UsageError
from fasim.traces.answers.series import figure
from fasim.traces.answers.sweep import COLUMNS
from fasim.traces.answers.table import Table

ASKED = ("sweep", "fa3", "fa2", "--batch", "1", "--heads", "1", "--seqlen", "128,256,1024")


def table(**lists: list) -> Table:
    """Rows at the crossings of a few lists, rates made up."""
    base = dict.fromkeys(COLUMNS) | {"schedule": "fa3", "seqlen_q": 128, "seqlen_k": 128, "tflops": 1.0}
    rows = [base]
    for name, values in lists.items():
        rows = [row | {name: value} | ({"seqlen_k": value} if name == "seqlen_q" else {}) for row in rows for value in values]
    return Table.of([row | {"tflops": float(number)} for number, row in enumerate(rows)], COLUMNS)


def test_what_varies_tells_the_lines_apart():
    found = figure(table(schedule=["fa3", "fa2"], seqlen_q=[512, 128, 1024]))
    assert (found.x, found.y, found.doubling) == ("seqlen_q", "tflops", True)
    assert found.lines == {"fa3": ((128, 1.0), (512, 0.0), (1024, 2.0)), "fa2": ((128, 4.0), (512, 3.0), (1024, 5.0))}
    both = table(seqlen_q=[128, 256], head_dim=[64, 128, 256])
    assert figure(both).x == "head_dim" and figure(both, "seqlen").lines.keys() == {"head dim 64", "head dim 128", "head dim 256"}
    assert not figure(both, "seqlen").doubling


@pytest.mark.parametrize(
    ("lists", "x", "y", "says"),
    [
        ({"seqlen_q": [1, 2]}, None, "tflop", "did you mean 'tflops'"),
        ({"seqlen_q": [1, 2]}, "seqlenn", "tflops", "did you mean 'seqlen'"),
        ({"seqlen_q": [1, 2]}, "batch", "tflops", "batch does not vary here; what does: seqlen_q"),
        ({"schedule": ["fa3", "fa2"]}, None, "tflops", "nothing varies that could be an axis"),
        ({"seqlen_q": [1, 2], "schedule": list("abcdefghijklmn")}, "seqlen", "tflops", "14 lines are more than"),
    ],
)
def test_what_cannot_be_plotted_is_a_sentence(lists, x, y, says):
    with pytest.raises(UsageError, match="^[^\n]+$") as found:
        figure(table(**lists), x, y)
    assert says in str(found.value)


def test_the_terminal_has_it_in_characters(fasim):
    status, out, _ = fasim(*ASKED, "--plot", "terminal", "--y", "time_s")
    drawn = out[out.index("time, s") :]
    assert status == 0 and drawn.count("●") >= 2 and drawn.count("◆") >= 2 and "sequence length" in drawn
    assert "1,024" in drawn and "● fa3" in drawn and "◆ fa2" in drawn


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_picture_is_written_whole(fasim, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"rates{suffix}"
    assert fasim(*ASKED, "--plot", str(path))[0] == 0
    data = path.read_bytes()
    if suffix == ".png":
        assert data.startswith(b"\x89PNG")
    else:
        text = data.decode()
        assert text.count("<svg") == 1 and all(word in text for word in ("TFLOP/s", "sequence length", "fa3", "fa2"))
    assert fasim(*ASKED, "--plot", str(path))[0] == 0 and path.read_bytes() == data


@pytest.mark.parametrize(
    ("place", "more", "says"),
    [("rates.pdf", (), "ends in .svg or .png"), ("terminal", ("--json",), "give a file"), ("/nowhere/x.svg", (), "cannot write")],
)
def test_a_place_that_is_none_is_said_before_the_work(fasim, place, more, says):
    status, out, err = fasim(*ASKED, "--plot", place, *more)
    assert (status, out) == (2, "") and says in err
