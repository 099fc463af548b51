"""All that a new text of the CUDA backward is to answer on a GPU: `python -m fasim.kernels.measure.session_backward --out DIR`.

In order: is each kernel right (fp64, both modes, side by side), how fast is it beside its siblings, what do its warpgroups do when,
the validation suite, the sanitizer, endurance, beside other people's, runs with counters. A kernel that is wrong is left out of
all that follows. Each step has so many seconds, all of them together `--seconds`; what a step says goes to DIR/STEP-KERNEL.log,
what became of it to DIR/session.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

KERNELS = {"apart": (64, 128), "across": (128,), "late": (128,), "relay": (256,), "lagged": (64, 128)}
"""Schedule -> the head dims that it is meant for."""
LEAST_S = 10
"""Seconds that a step is begun with at least."""


@dataclass(frozen=True)
class Step:
    """Commands that run side by side, each a module of fasim with its arguments, for at most so many seconds."""

    name: str
    seconds: float
    commands: Mapping[str, Sequence[str]]  # by the kernel that each is about, or any other word


@dataclass(frozen=True)
class Outcome:
    """What became of a step: exit status by command, 124 where its time was over; None where it was not begun."""

    name: str
    seconds: float
    status: Mapping[str, int | None]


def checks(kernels: Mapping[str, Sequence[int]]) -> Step:
    """Right or wrong, in both modes."""
    check = "kernels.cuda.backward.check"
    modes = {"": (), "-deterministic": ("--deterministic",)}
    return Step("check", 90, {
        f"{kernel}-d{head_dim}{mode}": (check, "--schedule", kernel, "--head-dims", str(head_dim), *more)
        for kernel, head_dims in kernels.items() for head_dim in head_dims for mode, more in modes.items()
    })  # fmt: skip


def steps(kernels: Mapping[str, Sequence[int]], out: Path, plan: Path) -> list[Step]:
    """What follows for those that are right."""
    dims, names = sorted({str(dim) for dims in kernels.values() for dim in dims}), list(kernels)
    pace, suite, measure = "kernels.cuda.backward.pace", "kernels.validation", "kernels.measure"
    same_bits = [f"{kernel}-deterministic" for kernel in names]
    subjects = [f"{kernel}-backward{mode}" for kernel in names for mode in ("", "-deterministic")]
    return [
        Step("pace", 70, {"all": (
            pace, "--head-dims", *dims, "--schedules", *names, "--seconds", "60", "--out", str(out / "pace.json"),
        )}),
        Step("deterministic", 35, {"all": (
            pace, "--head-dims", *dims, "--schedules", *names, "--seqlens", "4096", "16384", "--deterministic", "--seconds", "25",
            "--out", str(out / "deterministic.json"),
        )}),
        *(Step(f"timeline-{kernel}-d{head_dim}", 15, {kernel: (
            f"{measure}.timeline_backward", "--kernel", kernel, "--head-dim", str(head_dim), "--out", str(out / "timelines"),
        )}) for kernel, head_dims in kernels.items() for head_dim in head_dims if head_dim <= 128),
        Step("validate", 150, {f"{subject}-{dtype}": (
            suite, "--kernel", subject, "--dtype", dtype, "--out", str(out / "validation"),
        ) for subject in subjects for dtype in ("fp16", "bf16")}),
        Step("sanitize", 60, {kernel: (
            suite, "--kernel", f"{kernel}-backward", "--dtype", "fp16", "--quick", "--only", "memory", "--sanitize",
            "--out", str(out / f"sanitize-{kernel}"),
        ) for kernel in names}),
        Step("endurance", 90, {"all": (f"{measure}.endurance_backward", "--schedules", *names, "--out", str(out))}),
        Step("beside", 130, {"all": (
            f"{measure}.beside_backward", "--kernels", *names, *same_bits, "--head-dims", *dims, "--rounds", "4",
            "--seconds", "110", "--out", str(out),
        )}),
        Step("counters", 170, {"all": (
            measure, "--plan", str(plan), "--counters", "--seconds", "0.3", "--deadline", "150", "--out", str(out / "runs"),
        )}),
    ]  # fmt: skip


def run(step: Step, seconds: float, out: Path) -> Outcome:
    """Run a step's commands side by side, for at most so many seconds."""
    began, running = time.monotonic(), {}
    for name, (module, *arguments) in step.commands.items():
        log = (out / f"{step.name}-{name}.log").open("w", encoding="utf-8")
        command = [sys.executable, "-m", f"fasim.{module}", *arguments]
        running[name] = (subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT), log)
    status = {}
    for name, (process, log) in running.items():
        try:
            status[name] = process.wait(max(0.1, seconds - (time.monotonic() - began)))
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            status[name] = 124
        log.close()
    return Outcome(step.name, round(time.monotonic() - began, 1), status)


def session(
    kernels: Mapping[str, Sequence[int]], out: Path, plan: Path, seconds: float, only: Sequence[str] = (),
    do: Callable[[Step, float, Path], Outcome] = run,
) -> list[Outcome]:  # fmt: skip
    """All steps in order, or those named; written down after each. `do` runs one."""
    began, done = time.monotonic(), []

    def take(step: Step) -> Outcome:
        left = seconds - (time.monotonic() - began)
        outcome = do(step, min(step.seconds, left), out) if left >= LEAST_S else Outcome(step.name, 0, dict.fromkeys(step.commands))
        done.append(outcome)
        (out / "session.json").write_text(json.dumps([asdict(each) for each in done], indent=1) + "\n", encoding="utf-8")
        said = ", ".join(f"{name} {'not begun' if code is None else code}" for name, code in outcome.status.items())
        sys.stdout.write(f"{outcome.name}: {outcome.seconds:.0f} s; exit status {said}\n")
        sys.stdout.flush()
        return outcome

    if not only or "check" in only:
        found = take(checks(kernels)).status
        right = {
            kernel: tuple(dim for dim in dims if found[f"{kernel}-d{dim}"] == found[f"{kernel}-d{dim}-deterministic"] == 0)
            for kernel, dims in kernels.items()
        }
        kernels = {kernel: dims for kernel, dims in right.items() if dims}
    for step in steps(kernels, out, plan) if kernels else ():
        if not only or step.name in only:
            take(step)
    return done


def main() -> int:
    """0 where every command of every step ended with 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--kernels", nargs="+", choices=tuple(KERNELS), default=list(KERNELS))
    parser.add_argument("--steps", nargs="*", default=[], help="these alone: check, pace, whole-tiles, validate, ...")
    parser.add_argument("--seconds", type=float, default=600, help="for all steps together")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    from ... import traces

    plan = Path(traces.__file__).parent / "recorded" / "backward" / "ours.toml"
    done = session({kernel: KERNELS[kernel] for kernel in given.kernels}, given.out, plan, given.seconds, given.steps)
    return int(any(code != 0 for outcome in done for code in outcome.status.values()))


if __name__ == "__main__":
    sys.exit(main())
