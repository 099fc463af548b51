"""What the fuzz tests share: inputs that no one would write, and what may come of one: an answer, or one sentence.

The examples are the same at every run (derandomize). An exception that gets out of the command, CPU time beyond SECONDS for one
input, or memory beyond MAX_BYTES fails the test with the input at hand.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import signal
from collections import Counter
from copy import deepcopy

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from fasim.cli.main import run as run_command
from fasim.simulator import limits
from fasim.simulator.errors import UsageError
from fasim.simulator.predict import predict
from fasim.simulator.problem.workload import Workload

SECONDS = 20
"""Of CPU time for one input: fifty times what the slowest takes."""
MAX_BYTES = 2 << 30
COUNTS: Counter[str] = Counter()

ODD = (
    "", " ", "-", "--", "-1", "0", "1", "2", "3", "7", "64", "128", "256", "1000", "1e3", "1e999", "nan", "inf", "-inf", "1_000",
    "0x10", "+5", " 5", "5 ", "1.5", "²", "١٢٨", "9" * 30, "9" * 5000, "-" + "9" * 5000, "2147483648", "9223372036854775808",
    "true", "no", "None", "\x1b[2J", "\x9b31m", "\u202e", "\u200b", "\udcff", "\0", "[/]", "[red]", "{}", "%s", "$HOME", "~",
    "a" * 5000, "é", "日本", "/dev/zero", "/dev/null", "/", ".", "..", "/proc/self/mem", "/nowhere/x", "x.toml", "h200", "H200",
    "a100-sxm", "fp16", "e4m3", "bf16", "1-4", "4-1", "1-", "0-9999999999999999", "128x128", "128x16", "192x96", "64x64",
    "128x16000000000", "16000000000x16", "0x0", "128x", "CTA0", "fa3", "fa1", "standard", "pingpong", "sustained", "burst", "1980",
)  # fmt: skip
VALUES = st.one_of(
    st.sampled_from([None, True, False, 0, -1, 1, 3, 10**39, -(10**39), 1e308, -1e308, 1e-300, 0.5]),
    st.sampled_from([[], {}, [[]], {"a": {"a": 1}}]),
    st.sampled_from(ODD),
    st.integers(-(2**65), 2**65),
    st.floats(allow_nan=False, allow_infinity=False),
    st.lists(st.integers(), max_size=4),
)


def examples(count: int):
    """So many examples, the same ones at every run."""
    quiet = (HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example)
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=quiet)


@contextlib.contextmanager
def cheap(monkeypatch):
    """Little may be predicted meanwhile, so that an example costs milliseconds; test_limits.py holds the true limits."""
    predict(Workload(1, 1, 128), "fa3")  # compiles
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(limits, "MAX_ACCESSES", 2_000)
    monkeypatch.setattr(limits, "MAX_LOOP", 40)
    monkeypatch.setattr(limits, "MAX_QUERY_TILES", 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MAX_BYTES


@contextlib.contextmanager
def bounded(what: object):
    """Fails where the block takes more CPU time than SECONDS."""

    def hangs(*_):
        raise AssertionError(f"{SECONDS} s of CPU time are not enough for {str(what)[:300]!r}")

    previous = signal.signal(signal.SIGVTALRM, hangs)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


def answer_or_sentence(kind: str, read, *arguments: object) -> object:
    """What `read` makes of an input, or None where it is refused in one sentence."""
    COUNTS[kind] += 1
    with bounded(arguments):
        try:
            return read(*arguments)
        except UsageError as error:
            COUNTS[f"{kind} refused"] += 1
            assert str(error).strip() and len(str(error)) < 2000
            return None


def command_line(kind: str, tokens: list[str]) -> int:
    """The exit status of one command line, whose output must be fit to be shown."""
    COUNTS[kind] += 1
    out, err = io.StringIO(), io.StringIO()
    with bounded(tokens), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run_command(tokens)
    said = out.getvalue() + err.getvalue()
    assert status in (0, 1, 2, 3), (tokens, status)
    assert "Traceback" not in said and all(line.isprintable() for line in said.split("\n")), (tokens, said)
    if status == 2:
        COUNTS[f"{kind} refused"] += 1
        assert out.getvalue() == "" and err.getvalue().startswith("fasim: ") and err.getvalue().count("\n") == 1, (tokens, said)
    return status


def told(capsys) -> None:
    """Print how many inputs of each kind there were, so that a strategy which draws nothing is seen."""
    with capsys.disabled():
        print("\nfuzz: " + ", ".join(f"{count:,} {kind}" for kind, count in sorted(COUNTS.items())))
    kinds = [kind for kind in COUNTS if not kind.endswith(" refused")]
    assert kinds and all(0 < COUNTS[f"{kind} refused"] < COUNTS[kind] for kind in kinds), "some of each pass and some do not"


def places(value: object, at: tuple = ()) -> list[tuple]:
    """Every place in a tree of tables and lists, of a list the first two."""
    found = [at] if at else []
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    return found + [place for key, each in inner for place in places(each, (*at, key))]


@st.composite
def spoiled(draw, tree: dict) -> dict:
    """The tree with one or two places changed, left out or added to."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 2))):
        *path, last = draw(st.sampled_from(places(tree) or [("x",)]))
        inner = tree
        for key in path:
            inner = inner[key]
        how = draw(st.sampled_from(("change", "change", "change", "leave out", "add")))
        if how == "add" and isinstance(inner, dict):
            inner[draw(st.sampled_from(("x", "", "\x1b", "batch", "cycles")))] = deepcopy(draw(VALUES))
        elif how == "leave out" and last != "x":
            del inner[last]
        else:
            known = near(inner.get(last) if isinstance(inner, dict) else inner[last])
            inner[last] = deepcopy(draw(st.one_of(known, VALUES)))  # a list of VALUES that is put into itself has no end
    return tree


def near(value: object) -> st.SearchStrategy:
    """Values like this one, many of which will do in its place."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.one_of(st.integers(1, 400), st.sampled_from((0, 2 * value, value + 1, 10**6)))
    if isinstance(value, float):
        return st.sampled_from((0.0, value / 2, value * 2, value * 1000, 1.0, 1))
    if isinstance(value, str):
        return st.sampled_from(("h200", "mine", "fa2", "fp16", "bf16", "e4m3", "cuda", "triton", "", value + " 日本"))
    return st.just(None)


@st.composite
def spliced(draw, data: bytes, tokens: tuple[bytes, ...]) -> bytes:
    """The bytes with up to three pieces cut out, and something odd in their place."""
    for _ in range(draw(st.integers(0, 3))):
        at, length = draw(st.integers(0, len(data))), draw(st.sampled_from((0, 0, 1, 2, 12)))
        piece = draw(st.one_of(st.sampled_from(tokens), st.binary(max_size=4)))
        data = data[:at] + piece + data[at + length :]
    return data
