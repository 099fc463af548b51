"""Lesson: power decides the clock, so the busiest kernel runs at the lowest."""

from __future__ import annotations

from ...simulator.results import metrics
from .course import HOPPER, Course
from .parts import Bars, Facts, Number, Question, Reading, Section, count, cycles, say, seconds, share

TITLE = "The clock"
ABOUT = "power is limited; a kernel that keeps the tensor cores busy is slowed down by its own success"
NEEDS = HOPPER
READING = Reading(
    code=(
        ("simulator/clock.py", "power from activity, and the clock that is left"),
        ("kernels/calibrate/power.py", "the microbenchmarks behind the watts"),
    ),
    papers=("FlashAttention-3 (arXiv:2407.08608), section 4: clocks pinned for the benchmark",),
)
LADDER = ("fa2", "warp-specialized", "pingpong", "fa3")


def sections(course: Course) -> tuple[Section, ...]:
    """The lesson on the course's device."""
    runs, gpu = course.runs(*LADDER), course.device
    last, first = runs[-1], runs[0]
    at_boost = last.cycles / gpu.max_clock_hz
    rows = tuple(
        (
            run.schedule,
            cycles(run.cycles),
            Number(run.sm_clock_hz, "Hz"),
            Number(run.power_w, "W"),
            seconds(metrics.time_s(run)),
            share(metrics.tensor_utilization(run)),
        )
        for run in runs
    )
    kept = course.measured("fa3")
    measured = (
        (say("Our `fa3` was measured after seconds of load at {clock} and {power}; the model says {predicted} and {watts}.",
             clock=Number(kept.sm_clock_hz, "Hz"), power=Number(kept.power_w, "W"), predicted=Number(last.sm_clock_hz, "Hz"), watts=Number(last.power_w, "W")),)
        if kept and kept.power_w else ()
    )  # fmt: skip
    return (
        Section(
            "Cycles are not time",
            (
                say("{name} may run at up to {boost}. But its board may draw {limit} over seconds, and every machine at work draws power. When the sum is too large, the board lowers clock and voltage until it fits.", name=gpu.name, boost=Number(gpu.max_clock_hz, "Hz"), limit=Number(gpu.power_limit_w, "W")),
                Facts(("schedule", ">cycles", ">clock", ">power", ">time", ">tensor cores"), rows),
                *measured,
                say("What a board settles at under load can be a little more than its limit. The busier the tensor cores, the fewer the cycles, and the lower the clock. Both numbers matter: a schedule that saves cycles gives some of them back."),
                Question(
                    say("`fa3` takes {n}. How many microseconds would that be at {boost}?", n=cycles(last.cycles), boost=Number(gpu.max_clock_hz, "Hz")),
                    answer=at_boost * 1e6, unit="µs", tolerance=0.02,
                    hint=say("Cycles over cycles per second."),
                    why=say("It takes {time}: power costs it {part} of its time.", time=seconds(metrics.time_s(last)), part=share(1 - at_boost / metrics.time_s(last))),
                ),
                Question(
                    say("By how many percent has `fa3` fewer cycles than `pingpong`?"),
                    answer=100 * (1 - last.cycles / runs[2].cycles), unit="%", tolerance=0.05,
                    hint=say("One less new over old, with cycles."),
                    why=say("In time it is only {time}.", time=share(1 - metrics.time_s(last) / metrics.time_s(runs[2]))),
                ),
            ),
        ),
        Section(
            "What draws the power",
            (
                say("Watts that a machine adds if it is at full rate on all SMs, on top of {idle} with clocks running and nothing to do, at the highest clock:", idle=Number(gpu.idle_w, "W")),
                Bars("watts at full rate", (("tensor cores", Number(gpu.tensor_w, "W")), ("instructions issued", Number(gpu.issue_w, "W")), ("shared memory", Number(gpu.smem_w, "W")), ("MUFU", Number(gpu.mufu_w, "W")))),
                say("Voltage falls with the clock, and power with its square: so a little less clock saves much power. A benchmark of a few milliseconds is over before the board reacts; that is why short and long benchmarks of one kernel differ (`--regime burst`)."),
                Question(
                    say("Energy is power times time. How many joules does one call of `fa3` take?"),
                    answer=metrics.energy_j(last), unit="J", tolerance=0.03,
                    hint=say("{power}, {time}.", power=Number(last.power_w, "W"), time=seconds(metrics.time_s(last))),
                    why=say("`fa2` takes {other} for the same result. On {n} SMs the faster schedule is the cheaper one.", other=Number(metrics.energy_j(first), "J"), n=count(gpu.sms)),
                ),
            ),
        ),
    )  # fmt: skip
