"""Nsight Compute's CSV (`--csv --page raw`) -> counters -> the fields of a Run.

The table has one row per profiled kernel and one column per metric; a row of units follows the header. Metrics keep their
names: what this file does not know is kept too, and what is missing stays missing, here and in the Run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from ..simulator.errors import UsageError
from ..simulator.reading import parse_csv
from ..simulator.results.run import Activity, Bytes, Run, Traffic
from ..simulator.values import printable, shown

CYCLES = "sm__cycles_elapsed.max"
HBM_READ, HBM_WRITE = "dram__bytes_read.sum", "dram__bytes_write.sum"
L2_READ_SECTORS, L2_WRITE_SECTORS = "lts__t_sectors_op_read.sum", "lts__t_sectors_op_write.sum"
SECTOR_BYTES = 32
L2_HIT_RATE = "lts__t_sector_hit_rate.pct"
DELIVERED = "l1tex__m_xbar2l1tex_read_bytes.sum"
MULTICAST = "l1tex__m_xbar2l1tex_read_bytes_mem_global_op_tma_ld_dest_multicast.sum"
STORED = "l1tex__m_l1tex2xbar_write_bytes.sum"
TENSOR = "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed"
MUFU = "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_elapsed"
ISSUE = "smsp__issue_active.avg.pct_of_peak_sustained_elapsed"
FMA = "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_elapsed"
ALU = "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_elapsed"
INSTRUCTIONS = "smsp__inst_executed.sum"
DURATION = "gpu__time_duration.sum"

NEEDED = (
    CYCLES, HBM_READ, HBM_WRITE, DELIVERED, STORED, L2_READ_SECTORS, L2_WRITE_SECTORS, L2_HIT_RATE,
    TENSOR, MUFU, ISSUE, INSTRUCTIONS, DURATION,
)  # fmt: skip
"""What a comparison is made of; all of them answer on an H100 or H200."""
WELCOME = (MULTICAST, FMA, ALU)
"""What is asked for as well where this version of Nsight Compute knows it."""
MAIN = "main kernel, "
"""Before the name of a counter of the longest of a backward's kernels; without it, the counter is of them all."""
GRID, BLOCK = "launch__grid_size", "launch__block_size"
LAUNCH = (
    "launch__registers_per_thread", "launch__shared_mem_per_block", "launch__cluster_dim_x", "launch__cluster_dim_y",
    "launch__cluster_size", "launch__waves_per_multiprocessor",
)  # fmt: skip
"""How one kernel was launched, which costs no pass. Its grid and block stand in columns of their own: CTAs, threads of a CTA."""

_TABLE = "Nsight Compute's table"
_UNIT = {
    CYCLES: "cycle", HBM_READ: "byte", HBM_WRITE: "byte", DELIVERED: "byte", MULTICAST: "byte", STORED: "byte",
    L2_READ_SECTORS: "sector", L2_WRITE_SECTORS: "sector", L2_HIT_RATE: "%", TENSOR: "%", MUFU: "%", ISSUE: "%", FMA: "%", ALU: "%",
    INSTRUCTIONS: "inst", DURATION: "second",
}  # fmt: skip
"""What each of them is counted in."""
_SCALE = {
    "ns": ("second", 1e-9), "us": ("second", 1e-6), "ms": ("second", 1e-3), "s": ("second", 1.0),
    "nsecond": ("second", 1e-9), "usecond": ("second", 1e-6), "msecond": ("second", 1e-3), "second": ("second", 1.0),
    "hz": ("hz", 1.0), "Khz": ("hz", 1e3), "Mhz": ("hz", 1e6), "Ghz": ("hz", 1e9),
    "%": ("%", 1.0),
} | {
    f"{prefix}{base}": (base, scale)
    for base in ("byte", "cycle", "inst/cycle", "sector", "inst", "request", "warp", "thread", "block", "pass", "register", "")
    for prefix, scale in (("", 1.0), ("K", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12))
}  # fmt: skip
"""ncu's units: what each counts, and how many of it."""
_SIZES = re.compile(r"\((\d{1,10}), (\d{1,10}), (\d{1,10})\)")
_EACH = re.compile(r"/(?:thread|block)$")
"""Of an attribute of a launch, such as byte/block."""
_FIXED = ("ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Block Size", "Grid Size",
          "Device", "CC")  # fmt: skip
_FIGURE = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d{1,40})?(?:\.\d{1,40})?(?:[eE][-+]?\d{1,3})?")
_ELSEWHERE = str.maketrans({",": ".", **dict.fromkeys(".\u00a0\u202f", ",")})
"""From figures with a comma before their decimals, and points or narrow spaces between thousands, to 1,234.5."""
_COLUMNS = ('"ID",', "ID,", '"Process ID",', "Process ID,")
"""How a table begins, with quotes or, where another program has written it anew, without."""


@dataclass(frozen=True)
class Profiled:
    """One kernel under Nsight Compute: its name and metrics, in bytes, seconds, Hz, percent or counts."""

    name: str
    metrics: dict[str, float]


def parse(text: str) -> list[Profiled]:
    """The profiled kernels of a run of ncu, in the order of their launch.

    `text` is all that ncu wrote. Raises UsageError, one sentence with ncu's own complaint, where it holds no table, where
    the table is damaged, and where a figure that is needed cannot be read for certain.
    """
    lines = text.removeprefix("\ufeff").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith(_COLUMNS)), None)
    if start is None:
        raise UsageError(f"Nsight Compute wrote no table: {complaint(text)}")
    head = lines[start]
    there = [line for line in lines[start:] if line.startswith('"') or (head[0] != '"' and not line.startswith("=="))]
    ((*names,),) = parse_csv(head, _TABLE)
    if "Kernel Name" not in names:
        raise UsageError(f"{_TABLE} has no column 'Kernel Name': it must be of --page raw, or of --page details")
    if not head.strip('"').startswith("ID"):
        raise UsageError(f"{_TABLE} has no column 'ID': export it without --print-summary")
    if "Metric Name" in names:
        return _of_details("\n".join(there), names)
    header, *body = parse_csv("\n".join(there), _TABLE)
    units = [""] * len(header)
    if body and not body[0][0].strip():
        units, body = body[0], body[1:]
    name, figures = header.index("Kernel Name"), [column not in _FIXED for column in header]
    read = _reader(cell for row in body for cell, is_figure in zip(row, figures, strict=True) if is_figure)
    return [Profiled(printable(row[name]), _metrics(header, units, row, read)) for row in body]


LABELS = {
    "Elapsed Cycles": CYCLES,
    "Duration": DURATION,
    "L2 Hit Rate": L2_HIT_RATE,
    "Executed Instructions": INSTRUCTIONS,
}
"""What --page details calls some of them (its cycles are a GPC's, within 1 % of the SMs'); others stand there by their own names
where they were asked for."""
CYCLES_ACTIVE, ISSUED_WHILE_ACTIVE, SUB_PARTITIONS = "SM Active Cycles", "Issued Ipc Active", 4
"""From these the issue slots follow; "Issue Slots Busy" is a share of all cycles in one version, and of active ones in another."""
ALIASES = {
    "sm__issue_active.avg.pct_of_peak_sustained_elapsed": ISSUE,
    "sm__inst_issued.avg.pct_of_peak_sustained_elapsed": ISSUE,
}
"""Counters of a whole SM in `--set full` that are one of its sub-partitions' by another name."""


def _of_details(text: str, header: Sequence[str]) -> list[Profiled]:
    """The kernels of a table with a row per metric, as --page details has it: rows without a remark end before its columns."""
    missing = [name for name in ("Metric Unit", "Metric Value") if name not in header]
    if missing:
        raise UsageError(f"{_TABLE} has no column {missing[0]!r}: export it without --print-summary")
    at = {name: header.index(name) for name in ("ID", "Kernel Name", "Metric Name", "Metric Unit", "Metric Value")}
    _, *body = parse_csv(text, _TABLE, least=1 + max(at.values()))
    found: dict[str, Profiled] = {}
    read = _reader(row[at["Metric Value"]] for row in body)
    for row in body:
        kernel = found.setdefault(row[at["ID"]], Profiled(printable(row[at["Kernel Name"]]), {}))
        label = row[at["Metric Name"]].strip()
        if label:
            name = LABELS.get(label, label)
            value = _quantity(name, row[at["Metric Unit"]].strip(), read(row[at["Metric Value"]]))
            if value is not None:
                kernel.metrics.setdefault(printable(name), value)
    for kernel in found.values():
        issued, active, cycles = (kernel.metrics.get(name) for name in (ISSUED_WHILE_ACTIVE, CYCLES_ACTIVE, CYCLES))
        if issued is not None and active is not None and cycles:
            kernel.metrics.setdefault(ISSUE, 100 * issued / SUB_PARTITIONS * active / cycles)
    return list(found.values())


def _reader(cells: Iterable[str]) -> Callable[[str], str]:
    """How a figure of this table becomes 1,234.5: as it is, or from 1.234,5 where some are so and none is otherwise."""
    here, elsewhere = False, False
    for cell in map(str.strip, cells):
        is_here, is_elsewhere = _FIGURE.fullmatch(cell), _FIGURE.fullmatch(cell.translate(_ELSEWHERE))
        here, elsewhere = here or (is_here and not is_elsewhere), elsewhere or (is_elsewhere and not is_here)
    if elsewhere and not here:
        return lambda cell: cell.strip().translate(_ELSEWHERE)
    return str.strip


def complaint(text: str) -> str:
    """The first error that ncu printed, in its words, or its last line."""
    said = [line.removeprefix("==ERROR==").strip() for line in text.splitlines() if line.startswith("==ERROR==")]
    rest = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("==PROF==")]
    return printable((said or rest[-1:] or ["it printed nothing"])[0])[:400]


def _metrics(
    header: Sequence[str], units: Sequence[str], row: Sequence[str], read: Callable[[str], str]
) -> dict[str, float]:
    found = {}
    for column, unit, text in zip(header, units, row, strict=True):
        if column not in _FIXED and column.strip():
            unit = _EACH.sub("", unit) if column.startswith("launch__") else unit
            value = _quantity(column, unit.strip(), read(text))
            if value is not None:
                found[printable(column)] = value
    for other, name in ALIASES.items():
        if other in found:
            found.setdefault(name, found[other])
    for column, name in (("Grid Size", GRID), ("Block Size", BLOCK)):
        sizes = _SIZES.fullmatch(row[header.index(column)].strip()) if column in header else None
        if sizes:
            found[name] = float(math.prod(map(int, sizes.groups())))
    return found


def _quantity(column: str, unit: str, text: str) -> float | None:
    """A figure such as 1,234.5 in its base unit; None for n/a, nan, an empty cell or words.

    A column that this file does not know is left out where its unit or figure is strange; one that is needed is refused.
    """
    if not text[:1].isdigit() and text[:1] not in ("-", "+", "."):
        return None
    known, wanted = _SCALE.get(unit), _UNIT.get(column)
    where = f"{_TABLE}, column {column}"
    if known is None or (wanted and wanted != known[0]):
        if wanted is None:
            return None
        raise UsageError(f"{where}: its unit is {shown(unit)}, expected {wanted}")
    value = float(text.replace(",", "")) if _FIGURE.fullmatch(text) and any(c.isdigit() for c in text) else None
    if value is None or not abs(value) < 1e300:
        if wanted is None:
            return None
        raise UsageError(f"{where}: {shown(text)} is no figure (1,234.5 is: a comma between thousands, a point before decimals)")
    return value * known[1]


def total(kernels: Sequence[Profiled]) -> dict[str, float]:
    """The counters of a call that launched these kernels one after another.

    Sums add up, and so do cycles; percentages are averaged, the L2 hit rate by sectors and all others by cycles. What one
    of the kernels lacks is left out, and so is what ncu prints unasked: attributes of the device. How it was launched is of
    one kernel, and left out where there are several.
    """
    if not kernels:
        return {}
    shared = set.intersection(*(set(kernel.metrics) for kernel in kernels))
    found = {}
    for name in sorted(shared):
        values = [kernel.metrics[name] for kernel in kernels]
        if name == CYCLES or (name.endswith(".sum") and not name.startswith("profiler__")):
            found[name] = sum(values)
        elif name in NEEDED + WELCOME:
            by = (L2_READ_SECTORS, L2_WRITE_SECTORS) if name == L2_HIT_RATE else (CYCLES,)
            weights = [sum(kernel.metrics.get(each, 0.0) for each in by) for kernel in kernels]
            if len(kernels) == 1 or all(weights):
                found[name] = values[0] if len(kernels) == 1 else _mean(values, weights)
        elif name in (GRID, BLOCK, *LAUNCH) and len(kernels) == 1:
            found[name] = values[0]
    return found


def main_of(kernels: Sequence[Profiled]) -> Profiled:
    """The longest of a call's kernels."""
    return max(kernels, key=lambda each: each.metrics.get(CYCLES, 0.0))


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


def with_counters(run: Run, kernels: Sequence[Profiled]) -> Run:
    """A measured run with what Nsight Compute counted for the kernels of one call.

    Cycles become the counted ones where they were, and utilisations busy cycles. L2 bytes are those that crossed between
    SMs and L2, as the model counts them, a multicast once per cluster; the lookups in L2 (sectors) may be fewer, since
    requests of several SMs for a line merge. HBM writes leave out what was still dirty in L2 when the kernel ended. Of a
    backward, which is several kernels, the counters of the longest stand beside those of all.
    """
    if run.measurement is None:
        raise ValueError("counters belong to a measured run")
    counted = total(kernels)
    cycles = round(counted[CYCLES]) if counted.get(CYCLES) else run.cycles
    sms = run.activity.sms

    def busy(name: str) -> float | None:
        return None if name not in counted or CYCLES not in counted else counted[name] / 100 * cycles * sms

    def whole(name: str) -> int | None:
        return None if name not in counted else round(counted[name])

    delivered, cluster = whole(DELIVERED), run.tile.cluster if run.tile else 1
    if delivered is not None and cluster > 1:
        delivered = None if MULTICAST not in counted else delivered - round(counted[MULTICAST] * (1 - 1 / cluster))
    moved = Bytes(
        algorithmic_read=None,
        algorithmic_write=None,
        l2_read=delivered,
        l2_write=whole(STORED),
        hbm_read=whole(HBM_READ),
        hbm_write=whole(HBM_WRITE),
    )
    lookups = round(counted[L2_READ_SECTORS] * SECTOR_BYTES) if L2_READ_SECTORS in counted else None
    hits = 1 - moved.hbm_read / moved.l2_read if moved.l2_read and moved.hbm_read is not None else None
    if run.workload.backward:
        counted |= {f"{MAIN}{name}": value for name, value in total([main_of(kernels)]).items()}
    taken = replace(
        run.measurement,
        cycles_from=CYCLES if CYCLES in counted else run.measurement.cycles_from,
        counters=counted,
        kernels=tuple((kernel.name, kernel.metrics.get(CYCLES)) for kernel in kernels),
    )
    return replace(
        run,
        cycles=cycles,
        activity=Activity(sms, busy(TENSOR), busy(MUFU), busy(ISSUE), busy(FMA), busy(ALU)),
        traffic=Traffic({"all": moved}, hits, None, None, lookups),
        measurement=taken,
    )
