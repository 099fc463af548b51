"""The commands. Each parses, asks the simulator or the published tables, and hands the answer to a renderer.

Nothing heavy is imported until a command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..simulator.errors import UsageError
from . import output
from .options import Json, MachineOptions, Schedules, WorkloadOptions

_DEFAULT = WorkloadOptions()
_MACHINE = MachineOptions()


def predict(
    workload: WorkloadOptions = _DEFAULT,
    machine: MachineOptions = _MACHINE,
    *,
    schedule: Schedules = ("fa3",),
    json: Json = False,
) -> None:
    """Predict cycles, time, bytes and power of one schedule, or compare several.

    Shows time, TFLOP/s, how busy tensor cores, MUFU and issue slots are, the bytes of every tensor at three levels
    (algorithmic, L2, HBM), and the resource that holds the kernel back. Where the papers measured this very workload,
    their figure stands beside the prediction.

    Example: fasim predict --schedule warp-specialized --schedule pingpong --schedule fa3 --causal

    Theory: attention needs one exp2 for every 4 d FLOPs, and the MUFU is hundreds of times slower than the tensor
    cores, so what decides is how much of the softmax a schedule hides under the GEMMs.
    """
    problem = workload.build()
    runs = []
    with output.progress("predicting") as advance:
        for done, name in enumerate(schedule):
            advance(done, len(schedule), name)
            runs.append(machine.predict(problem, name))
    if json:
        output.emit_json(runs[0].to_dict() if len(runs) == 1 else [run.to_dict() for run in runs])
        return
    from . import tables

    console = output.stdout()
    console.print(tables.result(runs[0]) if len(runs) == 1 else tables.comparison(runs))


def roofline(
    workload: WorkloadOptions = _DEFAULT,
    machine: MachineOptions = _MACHINE,
    *,
    schedule: Schedules = ("fa3",),
    json: Json = False,
) -> None:
    """Draw where the workload stands for HBM, L2, tensor cores and MUFU.

    Each resource alone would take some least time; the longest of them bounds the kernel. The plot shows attainable
    TFLOP/s over FLOPs per HBM byte, with a marker for each predicted schedule.

    Example: fasim roofline --seqlen 512 --schedule standard --schedule fa3

    Theory: attention's intensity grows with the sequence when S and P stay on chip, and stays flat when they do not:
    that is why standard attention hangs under the sloping HBM roof and FlashAttention reaches the flat one.
    """
    from ..traces.standing import standing

    problem = workload.build()
    found = standing([machine.predict(problem, name) for name in schedule], machine.load())
    if json:
        output.emit_json(found.to_dict())
        return
    from . import tables

    output.stdout().print(tables.standing(found))


def published(
    *,
    figure: Annotated[str | None, Parameter(name="--figure")] = None,
    json: Json = False,
) -> None:
    """Set the papers' tables beside the predictions.

    For every published forward bar whose implementation has a schedule here: the bar, the prediction, the raw error;
    per group the mean absolute error (MAPE), the "implementation efficiency" (geometric mean of published over
    predicted) and the error that is left after that one factor.

    Example: fasim published --figure 5c

    Theory: the papers' bars are kernels of their year. A model of the schedule overshoots them by what the kernel of
    that year left on the table; a good model overshoots evenly, so the error after one factor is the telling one.

    Parameters
    ----------
    figure
        A figure or panel (5, 5c; fa2-5c or fa3-5c where both papers have one), ablation, h200 or hbm. Without it: all.
    """
    from ..traces import hbm as figure_2
    from ..traces import published as book
    from . import published_tables as render

    wants_hbm = figure is None or figure.lower() == "hbm"
    with output.progress("predicting") as advance:
        report = None if figure and wants_hbm else book.report(figure, advance=advance)
        hbm = figure_2.hbm_report(advance=advance) if wants_hbm else None
    if json:
        output.emit_json(render.plain(report, hbm))
        return
    console = output.stdout()
    for part in render.report(report) if report else ():
        console.print(part)
    for part in render.hbm(hbm) if hbm else ():
        console.print(part)


def schedules(*, json: Json = False) -> None:
    """List the schedules: the idea of each and where it comes from.

    Example: fasim schedules

    Theory: two neighbours in the list differ by one idea; the difference of their files is that idea.
    """
    from ..simulator.schedules import SCHEDULES

    if json:
        output.emit_json([{"name": s.name, "summary": s.summary, "paper": s.paper} for s in SCHEDULES.values()])
        return
    from . import tables

    output.stdout().print(tables.schedules(SCHEDULES.values()))


def devices(name: str | None = None, /, *, json: Json = False) -> None:
    """List the devices, or every field of one with its source.

    Example: fasim devices h200

    Theory: a field is a datasheet figure, a published one, or a microbenchmark of ours; none is fitted to attention.

    Parameters
    ----------
    name
        A device, or the path of your own TOML file.
    """
    from ..simulator.device import DEVICE_NAMES, load_device

    found = {each: load_device(each) for each in ([name] if name else DEVICE_NAMES)}
    from . import tables

    if json:
        fields = {each: tables.device_fields(device) for each, device in found.items()}
        output.emit_json(fields[name] if name else fields)
        return
    output.stdout().print(tables.device(found[name]) if name else tables.devices(found))


def disasm(
    schedule: str,
    /,
    workload: WorkloadOptions = _DEFAULT,
    machine: MachineOptions = _MACHINE,
    *,
    kv_blocks: int = 3,
    json: Json = False,
) -> None:
    """Print the instruction streams that a schedule records.

    One stream per warp, as the engine replays them: loads, waits with barrier and generation, GEMMs, arithmetic by
    instruction class, hand-overs.

    Example: fasim disasm pingpong --kv-blocks 2

    Theory: a schedule is its order of instructions; everything the timeline shows follows from this text.

    Parameters
    ----------
    schedule
        Name of a schedule (see `fasim schedules`).
    kv_blocks
        Length of the loop to record.
    """
    if kv_blocks <= 0:
        raise UsageError(f"--kv-blocks {kv_blocks} must be positive")
    from ..simulator.predict import default_tile, programs
    from ..simulator.program import disassemble

    problem, device = workload.build(), machine.load()
    tile = machine.choose_tile(problem, schedule, device) or default_tile(problem, schedule, device)
    texts = [disassemble(program) for program in programs(problem, schedule, device, tile, kv_blocks)]
    if json:
        output.emit_json({"schedule": schedule, "kernels": [text.splitlines() for text in texts]})
        return
    output.emit_text("\n\n".join(text.rstrip() for text in texts))


def validate(
    kernel: str | None = None,
    *,
    quick: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    only: Annotated[tuple[str, ...], Parameter(name="--only", negative=(), show_default=False)] = (),
    seed: int = 0,
    device: str | None = None,
    dtype: str = "fp16",
    sanitize: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    self_test: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    junit: Path | None = None,
    json: Json = False,
) -> int:
    """Hold an attention kernel to fp64: accuracy, inputs, shapes, memory, determinism, gradients.

    Checks ours, PyTorch's (torch-cudnn, torch-fa2, torch-math) or your own function, given as package.module:function
    and called as f(q, k, v, causal=..., softmax_scale=...) -> O or (O, LSE), on (B, S, H, D) tensors. Raise
    NotImplementedError for what it does not support. Exit status: 0 pass, 1 a check failed, 3 no GPU where one is needed.

    Example: fasim validate my_kernels.attention:forward --quick

    Theory: an error is large or small only beside what PyTorch makes in the same precision (FlashAttention's rule: at
    most twice that, plus rounding), and a suite is worth what it rejects: --self-test plants faults and counts.

    Parameters
    ----------
    kernel
        standard, fa1, fa2, torch-cudnn, torch-fa2, torch-math, or package.module:function. [default: all of ours]
    quick
        One head dim and the shorter lengths.
    only
        Run this group of checks alone; repeat it for several.
    seed
        Seed of all inputs; a failed check prints the one that repeats it.
    device
        cuda, or cpu for callables that run there. [default: cuda; cpu with --self-test]
    dtype
        fp16, bf16, fp32 or fp64.
    sanitize
        Also run compute-sanitizer's memcheck and racecheck.
    self_test
        Hold the suite itself to its planted faults and show which group rejects which.
    junit
        Also write the checks as JUnit XML.
    """
    try:
        from ..kernels.validation import subjects, suite
        from ..kernels.validation.check import MissingTool
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "torch":
            raise
        output.note("fasim: validate needs torch, which is not installed: pip install 'fasim[kernels]'")
        return 3
    from . import validate as render

    try:
        with output.progress("validating") as advance:
            if self_test:
                table = suite.self_test(device=device or "cpu", dtype=dtype, seed=seed, only=only, advance=advance)
                reports = []
            else:
                where = device or "cuda"
                chosen = [subjects.resolve(each, where) for each in ([kernel] if kernel else subjects.OURS)]
                options = {"device": where, "dtype": dtype, "seed": seed, "quick": quick, "only": only}
                reports = [
                    suite.validate(each, **options, with_sanitizer=sanitize, advance=advance) for each in chosen
                ]
    except MissingTool as error:
        output.note(f"fasim: {error}")
        return 3
    if self_test:
        output.emit_json(table.to_dict()) if json else output.stdout().print(render.kill_table(table))
        return 0 if table.passed else 1
    if junit:
        from ..kernels.validation.report import junit as as_xml

        output.write_file(junit, as_xml(reports))
        output.note(f"wrote {junit}")
    if json:
        output.emit_json(reports[0].to_dict() if len(reports) == 1 else [each.to_dict() for each in reports])
    else:
        titles = {name: title for name, (title, _) in suite.GROUPS.items()}
        for each in reports:
            output.stdout().print(render.report(each, titles))
    return 0 if all(each.passed for each in reports) else 1


def kernels(
    *,
    build: Annotated[bool, Parameter(name="--compile", negative=(), show_default=False)] = False,
    json: Json = False,
) -> int:
    """List the CUDA kernels: tile, registers, spills, shared memory, and whether each is compiled.

    Needs no GPU. Kernels are compiled by NVRTC on first use and kept in FASIM_CACHE_DIR (default: ~/.cache/fasim).
    Exit status: 0 good, 1 a kernel does not compile, 3 NVRTC is needed and not installed.

    Example: fasim kernels --compile

    Theory: registers and shared memory decide the tile. An SM has 65,536 registers for one CTA of these kernels; setmaxnreg
    takes them from the producer warpgroup and gives them to the consumers, which hold S, P and O.

    Parameters
    ----------
    build
        Compile what is not in the cache, on all cores.
    """
    from ..kernels.build import MissingCompiler
    from ..kernels.cuda import catalog

    try:
        with output.progress("compiling") as advance:
            found = catalog.entries(compiled=build, advance=advance)
    except MissingCompiler as error:
        output.note(f"fasim: {error}")
        return 3
    if json:
        output.emit_json([entry.to_dict() for entry in found])
    else:
        from . import kernels as render

        output.stdout().print(render.listing(found))
    if catalog.missing():
        output.note(f"no CUDA kernel yet: {', '.join(catalog.missing())}")
    return 1 if any(entry.error for entry in found) else 0
