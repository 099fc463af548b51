"""Runs the groups over a subject, and over the planted faults."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import date
from importlib import metadata

import torch

from ...simulator.errors import UsageError, did_you_mean
from ...traces.workers import spawned
from . import accuracy, autograd, calls, determinism, gradients, inputs, memory, process, sanitize, shapes, survey
from .bench import Bench
from .check import FAIL, NOTE, PASS, SKIP, Check, Fault, MissingTool, Noted, Skipped, Trial
from .criteria import DTYPES
from .decode import groups as decode
from .decode import mutants as decode_mutants
from .fp8 import groups as fp8
from .fp8 import mutants as fp8_mutants
from .fp8 import tiled as fp8_tiled
from .fp8.bench import Fp8Bench
from .kill_table import KillTable
from .mutants import MUTANTS, Mutant, TiledAttention
from .mutants import subject as tiled_subject
from .precision import DENSE, FP8, subjects_of
from .report import SURVEY, Report
from .subjects import Subject, head_dim
from .varlen import groups as varlen
from .varlen import mutants as varlen_mutants

GROUPS: dict[str, tuple[str, Callable]] = {
    "accuracy": ("O and LSE against fp64, at most twice the error of PyTorch in the same precision", accuracy.trials),
    "inputs": ("inputs that break a softmax", inputs.trials),
    "memory": ("what is written, kept and on which stream", memory.trials),
    "determinism": ("the same bits every time", determinism.trials),
    "gradients": ("dQ, dK, dV against fp64", gradients.trials),
    "autograd": ("backward as models use it: again, later, in any order, for some inputs, into .grad", autograd.trials),
    "process": ("what a call leaves behind, and CUDA graphs", process.trials),
    "shapes": ("lengths, masks, heads, batches, layouts", shapes.trials),
}
"""Group -> what it asks, and the function that yields its trials. No group relies on another; shapes come last, because
a misaligned address may cost the GPU context."""

Advance = Callable[[int, int, str], None]


_KINDS = {"varlen": (varlen, varlen_mutants), "decode": (decode, decode_mutants)}
"""A kind that is not dense: its groups and its planted faults."""


def groups_of(dtype: str, kind: str = DENSE) -> dict[str, tuple[str, Callable]]:
    """The groups over kernels of a dtype and kind."""
    if kind in _KINDS:
        return _KINDS[kind][0].GROUPS
    return fp8.GROUPS if dtype == FP8 else GROUPS


def validate(
    subject: Subject | str,
    *,
    device: str = "cuda",
    dtype: str = "fp16",
    kind: str = DENSE,
    seed: int = 0,
    quick: bool = False,
    only: Sequence[str] = (),
    head_dims: Sequence[int | str] = (),
    forward_only: bool = False,
    with_sanitizer: bool = False,
    advance: Advance = lambda done, total, what: None,
    known: dict | None = None,
    enough: Callable[[Check], bool] | None = None,
    begin: int = 0,
    journal: Callable[[str, object], None] = lambda kind, value: None,
) -> Report:
    """Hold `subject`, or what it names, to the groups in `only` (all where empty) and return what was found.

    `head_dims`, such as 96 or "192x128" (of Q and K, and of V), stand in for the subject's own; `forward_only` asks for no
    gradients. A group ends with the check that is `enough`, and with that the RMSE table is left out. `journal` is told every
    question and answer as it comes, and the first `begin` questions are left out: what isolation.py goes by.

    Raises UsageError for a name, a device, dtype, head dim or group that does not exist or that the subject does not take, and
    MissingTool where a GPU, or the sanitizer, is asked for and missing.
    """
    subject = subjects_of(dtype, kind).resolve(subject, device) if isinstance(subject, str) else subject
    wanted = tuple(dict.fromkeys(map(head_dim, head_dims)))
    subject = replace(subject, head_dims=wanted) if wanted else subject
    subject = replace(subject, differentiable=False) if forward_only else subject
    bench = bench_of(subject, device, dtype, seed, quick)
    chosen = _chosen(only, dtype, kind)
    if with_sanitizer:
        sanitize.require()
    report = Report(
        subject=subject.name,
        device=_device_name(bench.device),
        dtype=dtype,
        seed=seed,
        quick=quick,
        environment=_environment(bench.device)
        | {"kernel_sha256": subject.source_sha256, "package": subject.package, "date": date.today().isoformat()},
        options=(
            f"--device {device}",
            f"--dtype {dtype}",
            *([f"--kind {kind}"] if kind != DENSE else []),
            *(["--quick"] if quick else []),
            *(f"--head-dim {each}" for each in wanted),
            *(["--forward-only"] if forward_only else []),
            *(f"--with {each}" for each in subject.arguments),
        ),
    )
    if known is not None:
        bench.known = known
    started = time.perf_counter()
    advance(0, 1, f"{subject.name}, {SURVEY}")
    about = ("subject", "device", "dtype", "seed", "quick", "environment", "options")
    journal("report", {name: getattr(report, name) for name in about})
    surveyed = survey.survey(bench)
    if begin == 0:
        report.checks += surveyed
        for check in surveyed:
            journal("check", check.to_dict())
    if not bench.subject.head_dims:
        report.seconds = time.perf_counter() - started
        return report
    plan = [("sanitize", trial) for trial in sanitize.trials(bench, kind)] if with_sanitizer else []
    plan += [(group, trial) for group in chosen for trial in _trials(bench, groups_of(dtype, kind), group)]
    ended: set[str] = set()
    for done, (group, trial) in enumerate(plan):
        if done < begin or group in ended:
            continue
        journal("asking", [done, len(plan), group, trial.name])
        advance(done, len(plan), f"{subject.name}, {group}: {trial.name}")
        bench.group = group
        report.checks.append(_ask(bench, trial))
        if bench.on_gpu and not _gpu_answers():
            lost = "the GPU no longer answers after this call (an illegal address, or an assertion on the device)"
            report.checks[-1] = Check(group, trial.name, FAIL, seed, f"{lost}; {report.checks[-1].message}".rstrip("; "))
            journal("check", report.checks[-1].to_dict())
            journal("lost", None)
            break
        journal("check", report.checks[-1].to_dict())
        if enough and enough(report.checks[-1]):
            ended.add(group)
        if group == "accuracy" and not enough and dtype != FP8 and trial.name == accuracy.table_case(bench).name:
            report.rmse = _rmse(bench)
            journal("rmse", report.rmse)
    report.seconds = time.perf_counter() - started
    return report


def bench_of(subject: Subject, device: str, dtype: str, seed: int, quick: bool) -> Bench:
    """The bench for a dtype; raises what `validate` raises."""
    if device not in ("cuda", "cpu"):
        raise UsageError(f"--device {device!r} is not possible: give cuda or cpu")
    names = (*DTYPES, FP8)
    if dtype not in names:
        raise UsageError(f"--dtype {dtype!r} is not possible: give one of {', '.join(names)}{did_you_mean(dtype, names)}")
    if dtype not in subject.dtypes:
        raise UsageError(f"{subject.name} takes {', '.join(subject.dtypes)}, not {dtype}")
    if device == "cpu" and subject.needs_cuda:
        raise MissingTool(f"{subject.name} runs on a GPU only; --device cpu is for your own callables and torch-math")
    if device == "cuda" and not torch.cuda.is_available():
        raise MissingTool("no CUDA GPU here, so nothing was validated; --device cpu takes callables that run on the CPU")
    if dtype == FP8:
        return Fp8Bench(subject, torch.device(device), torch.float8_e4m3fn, seed, quick)
    return Bench(subject, torch.device(device), DTYPES[dtype], seed, quick)


def _chosen(only: Sequence[str], dtype: str, kind: str) -> list[str]:
    groups = groups_of(dtype, kind)
    for name in only:
        if name not in groups:
            raise UsageError(f"--only {name!r} is no group of checks: give one of {', '.join(groups)}{did_you_mean(name, groups)}")
    return [name for name in groups if not only or name in only]


def _trials(bench: Bench, groups: dict[str, tuple[str, Callable]], group: str) -> list[Trial]:
    bench.group = group
    return list(groups[group][1](bench))


def _ask(bench: Bench, trial: Trial) -> Check:
    """One trial's check. What the subject raises becomes a failed check; only our own errors travel on."""
    try:
        return Check(bench.group, trial.name, PASS, bench.seed, figures=trial.run())
    except Skipped as reason:
        return Check(bench.group, trial.name, SKIP, bench.seed, str(reason))
    except Noted as note:
        return Check(bench.group, trial.name, NOTE, bench.seed, str(note), note.figures)
    except Fault as fault:
        return Check(bench.group, trial.name, FAIL, bench.seed, str(fault))
    except torch.OutOfMemoryError as error:
        message = f"out of GPU memory: {str(error).splitlines()[0]}"
        torch.cuda.empty_cache()
        return Check(bench.group, trial.name, FAIL, bench.seed, message)
    except (MissingTool, UsageError):
        raise
    except Exception as error:  # what came back is so odd that holding it failed: a finding too, and no traceback
        where = calls.place(error)
        return Check(bench.group, trial.name, FAIL, bench.seed, f"cannot be checked, {calls.said(error)} in {where}")


def _gpu_answers() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _rmse(bench: Bench) -> list[dict]:
    try:
        return accuracy.table(bench)
    except (Fault, Skipped):
        return []  # the check of the same name says why


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _environment(device: torch.device) -> dict:
    """Versions that a result depends on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    with suppress(metadata.PackageNotFoundError):
        found["triton"] = metadata.version("triton")
    if device.type == "cuda":
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "driver": _driver()}
    return found


def _driver() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # a report without the driver's version is still a report
        return "unknown"


# -- self-test --------------------------------------------------------------------------------------------------------

PROCESSES_ON_CUDA = 4
"""The planted faults are tiles of plain torch: what takes the time is one CPU thread that launches them."""

_references: dict = {}
"""What the yardstick said of each case, in a process of `self_test`'s."""


def self_test(
    *,
    device: str = "cpu",
    dtype: str = "fp16",
    kind: str = DENSE,
    seed: int = 0,
    only: Sequence[str] = (),
    mutants: Sequence[Mutant] | None = None,
    processes: int | None = None,
    advance: Advance = lambda done, total, what: None,
) -> KillTable:
    """Hold every planted fault, and the correct kernel they are made from, to the suite.

    The group that must reject a mutant goes on until a check says what is wrong, every other group until any check fails:
    enough to say what would live without any one group. More than one of `processes` (None: 4 on a GPU, 1 on the CPU) are
    dealt the mutants (None: all of the dtype's) in turn, and this one takes the correct kernel; the table's order is theirs.

    The faults of a kind that is not dense are held to its own groups, whose faults they are, unless `only` says otherwise.

    Raises what `validate` raises, in whichever process, and UsageError where one of them dies.
    """
    subjects_of(dtype, kind)
    if kind in _KINDS:
        groups, faults = _KINDS[kind]
        correct, planted, only = faults.correct(), faults.MUTANTS, only or groups.OWN
    elif dtype == FP8:
        correct, planted = fp8_tiled.subject("tiled FP8 attention", fp8_tiled.TiledFp8()), fp8_mutants.MUTANTS
    else:
        correct, planted = tiled_subject("tiled attention", TiledAttention()), MUTANTS
    started, chosen = time.perf_counter(), _chosen(only, dtype, kind)
    mutants = planted if mutants is None else mutants
    bench_of(correct, device, dtype, seed, quick=True)  # what cannot be asked is said before a process is started
    processes = (PROCESSES_ON_CUDA if device == "cuda" else 1) if processes is None else processes
    if processes < 1:
        raise UsageError(f"{processes} processes are not possible: give 1 or more")
    options = {"device": device, "dtype": dtype, "kind": kind, "seed": seed, "quick": True, "only": tuple(only)}
    known: dict = {}
    found: dict[str, Report] = {}
    with _one_thread(), ExitStack() as pools:
        advance(0, len(mutants), "the correct kernel")
        if processes > 1:
            workers = [pools.enter_context(spawned(1, _begin)) for _ in range(processes)]
            asked = {workers[n % processes].submit(_held, each, options): each.name for n, each in enumerate(mutants)}
        table = KillTable(chosen, validate(correct, **options, known=known))
        answers = _as_they_come(asked) if processes > 1 else ((each.name, _held(each, options, known)) for each in mutants)
        for name, report in answers:
            found[name] = report
            advance(len(found), len(mutants), name)
    for mutant in mutants:
        table.reports[mutant.name], table.mutants[mutant.name] = found[mutant.name], mutant
    table.seconds = time.perf_counter() - started
    return table


def _held(mutant: Mutant, options: dict, known: dict = _references) -> Report:
    """One mutant's report, up to what is enough."""
    return validate(mutant.subject(), **options, known=known, enough=mutant.caught)


def _as_they_come(asked: dict[Future, str]) -> Iterator[tuple[str, Report]]:
    for each in as_completed(asked):
        try:
            yield asked[each], each.result()
        except BrokenProcessPool:
            raise UsageError(
                "self-test: one of its processes ended without an answer; python -m fasim.kernels.validation --self-test "
                "--processes 1 stays in one"
            ) from None


def _begin() -> None:
    torch.set_num_threads(1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch on one CPU thread: on tiles of 16 rows several spend ten times the work on waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


__all__ = ["GROUPS", "KillTable", "self_test", "validate"]
