"""Nsight Compute's CSV, as it was recorded on an H200 and as it can go wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fasim.kernels.measure.counters import part
from fasim.simulator.errors import UsageError
from fasim.simulator.problem.tile import Tile
from fasim.simulator.problem.workload import Workload
from fasim.simulator.results import metrics
from fasim.simulator.results.run import Activity, Bottleneck, Bytes, Measurement, Run, Traffic
from fasim.traces import nsight
from fasim.traces.nsight import CYCLES, Profiled

RECORDED = Path(__file__).parent / "data" / "ncu_h200.csv"
"""ncu 2025.3.1 on an H200: marker and call in turns, the device's attributes cut out."""


@pytest.fixture(scope="module")
def recorded() -> list[Profiled]:
    return nsight.parse(RECORDED.read_text(encoding="utf-8"))


@pytest.fixture
def timed() -> Run:
    """A measured run without counters."""
    taken = Measurement(
        kernel="k", implementation="cuda", gpu="NVIDIA H200", driver="580", cuda="13.0", date="2026-11-21", regime="sustained",
        l2="cold", buffers=2, launch="stream", calls=10, time_s=1e-3, time_p10_s=1e-3, time_p90_s=1e-3,
    )  # fmt: skip
    return Run(
        origin="measured", workload=Workload(4, 16, 4096), schedule="fa3", tile=None, device="h200", cycles=1_500_000,
        sm_clock_hz=1.5e9, power_w=700.0, activity=Activity(132, None, None, None, None, None),
        traffic=Traffic({"all": Bytes(None, None, None, None, None, None)}, None, None),
        bottleneck=Bottleneck("unknown", ""), measurement=taken,
    )  # fmt: skip


def test_the_recorded_table_gives_every_metric_of_every_kernel(recorded):
    assert all(set(nsight.NEEDED) <= set(kernel.metrics) for kernel in recorded)
    calls = part(recorded, sum("spin_kernel" in kernel.name for kernel in recorded))
    cudnn = next(call for call in calls if len(call) == 1 and "cudnn" in call[0].name)
    read = cudnn[0].metrics
    assert read[nsight.CYCLES] > 1e5 and 1e-5 < read[nsight.DURATION] < 1e-1  # seconds, from ns
    assert 1.0e9 < read[nsight.CYCLES] / read[nsight.DURATION] < 1.98e9


def test_a_recorded_call_of_three_kernels_adds_up(recorded, timed):
    calls = part(recorded, sum("spin_kernel" in kernel.name for kernel in recorded))
    (standard,) = (call for call in calls if len(call) == 3)
    run = nsight.with_counters(timed, standard)
    assert run.cycles == sum(kernel.metrics[nsight.CYCLES] for kernel in standard)
    assert run.measurement.cycles_from == nsight.CYCLES
    assert [name for name, _ in run.measurement.kernels] == ["_scores", "_softmax", "_values"]
    assert run.traffic.total("hbm_read") == sum(kernel.metrics[nsight.HBM_READ] for kernel in standard)
    shares = [kernel.metrics[nsight.TENSOR] / 100 for kernel in standard]
    assert min(shares) < metrics.tensor_utilization(run) < max(shares)


def table(*rows: str, header: str, units: str) -> str:
    return "\n".join(["==PROF== Connected to process 7", header, units, *rows]) + "\n"


HEADER = '"ID","Kernel Name","sm__cycles_elapsed.max","dram__bytes_read.sum","strange__metric.avg"'
UNITS = '"","","cycle","Mbyte",""'


def test_units_and_thousands_are_read():
    (kernel,) = nsight.parse(table('"0","f<a, b>(int)","1,234,567","1.5","3e2"', header=HEADER, units=UNITS))
    assert kernel == Profiled("f<a, b>(int)", {nsight.CYCLES: 1234567.0, nsight.HBM_READ: 1.5e6, "strange__metric.avg": 300.0})


@pytest.mark.parametrize("thousands", [".", "\u00a0", "\u202f", ""])
def test_figures_of_another_language_are_read_where_the_table_says_so_for_certain(thousands):
    cells = f'"0","k","1{thousands}234{thousands}567","1,50","201,5"'
    (kernel,) = nsight.parse(table(cells, header=HEADER, units=UNITS))
    assert kernel.metrics == {CYCLES: 1234567.0, nsight.HBM_READ: 1.5e6, "strange__metric.avg": 201.5}
    (kernel,) = nsight.parse(table('"0","k","1,234","1,500","9"', header=HEADER, units=UNITS))  # nothing says so
    assert kernel.metrics[CYCLES] == 1234.0


def test_a_table_that_another_program_has_written_anew_is_read():
    bare = table('"0","f<a, b>(int)","1,234,567","1.5","3"', header=HEADER, units=UNITS).replace('"0"', "0").replace('"k"', "k")
    bare = bare.replace(HEADER, HEADER.replace('"', "")).replace(UNITS, UNITS.replace('"', ""))
    (kernel,) = nsight.parse(bare + "==PROF== Disconnected from process 7\n")
    assert kernel == Profiled("f<a, b>(int)", {CYCLES: 1234567.0, nsight.HBM_READ: 1.5e6, "strange__metric.avg": 3.0})


@pytest.mark.parametrize("cell", ["", "n/a", "N/A", "nan", "inf", "no data", "(!) 12"])
def test_what_is_not_a_figure_is_missing(cell):
    (kernel,) = nsight.parse(table(f'"0","k","5","{cell}","1"', header=HEADER, units=UNITS))
    assert set(kernel.metrics) == {nsight.CYCLES, "strange__metric.avg"}


def test_missing_metrics_are_missing_in_the_run_and_unknown_ones_are_kept(timed):
    run = nsight.with_counters(timed, [Profiled("k", {nsight.CYCLES: 2e6, "strange__metric.sum": 4.0})])
    assert run.cycles == 2_000_000 and run.measurement.counters["strange__metric.sum"] == 4.0
    assert metrics.tensor_utilization(run) is None and run.traffic.total("hbm_read") is None and run.traffic.l2_hit_rate is None
    without = nsight.with_counters(timed, [Profiled("k", {nsight.TENSOR: 50.0})])
    assert without.cycles == timed.cycles and without.measurement.cycles_from == timed.measurement.cycles_from
    assert metrics.tensor_utilization(without) is None  # a share of unknown cycles is no number of busy ones


def test_a_metric_that_one_kernel_of_a_call_lacks_is_missing_for_the_call():
    both = [Profiled("a", {nsight.CYCLES: 1.0, nsight.HBM_READ: 2.0}), Profiled("b", {nsight.CYCLES: 3.0})]
    assert nsight.total(both) == {nsight.CYCLES: 4.0}
    assert nsight.total([]) == {}


def test_shares_become_busy_cycles_and_back(timed):
    shares = {nsight.TENSOR: 80.0, nsight.ISSUE: 40.0, nsight.MUFU: 30.0}
    run = nsight.with_counters(timed, [Profiled("k", {nsight.CYCLES: 1e6, **shares})])
    assert metrics.tensor_utilization(run) == pytest.approx(0.8)
    assert metrics.issue_utilization(run) == pytest.approx(0.4)
    assert metrics.mufu_utilization(run) == pytest.approx(0.3)


def test_a_multicast_counts_once_per_cluster(timed):
    counted = {nsight.CYCLES: 1e6, nsight.DELIVERED: 1000.0, nsight.MULTICAST: 800.0, nsight.HBM_READ: 60.0}
    pair = replace(timed, tile=Tile(128, 176, cluster=2))
    assert nsight.with_counters(pair, [Profiled("k", counted)]).traffic.total("l2_read") == 600
    assert nsight.with_counters(timed, [Profiled("k", counted)]).traffic.total("l2_read") == 1000
    del counted[nsight.MULTICAST]
    assert nsight.with_counters(pair, [Profiled("k", counted)]).traffic.total("l2_read") is None


def test_a_mark_at_the_start_an_empty_column_and_strange_columns_do_no_harm():
    rows = table('"0","k\x1b[1m","5","1.0","12,5","9"', header=HEADER + ',""', units=UNITS.replace("Mbyte", "Kbyte") + ',""')
    (kernel,) = nsight.parse("\ufeff" + rows.removeprefix("==PROF== Connected to process 7\n"))
    assert kernel == Profiled(r"k\x1b[1m", {CYCLES: 5.0, nsight.HBM_READ: 1e3})
    (kernel,) = nsight.parse(table('"0","k","5","1","7"', header=HEADER, units='"","","Kcycle","Mbyte","furlong"'))
    assert kernel.metrics == {CYCLES: 5e3, nsight.HBM_READ: 1e6}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "it printed nothing"),
        ("==ERROR== No kernels were profiled.\nbye", "No kernels were profiled"),
        ("==PROF== Connected\nTraceback: boom\n", "boom"),
        ('"ID","Metric Name"\n"0","x"\n', "--page raw"),
        (table('"0","k","5"', header=HEADER, units=UNITS), "cut short"),
        (table('"0","k","12,5","1.5","1"', header=HEADER, units=UNITS), f"{CYCLES}: '12,5' is no figure"),
        (table('"0","k","1,2345","1.5","1"', header=HEADER, units=UNITS), "'1,2345' is no figure"),
        ('"Process ID","Kernel Name","Metric Name","Metric Unit","Average"\n"7","k","Duration","us","5"\n', "--print-summary"),
        (table('"0","k","5","1.5 MB","1"', header=HEADER, units=UNITS), "'1.5 MB' is no figure"),
        (table('"0","k","5","1e999","1"', header=HEADER, units=UNITS), "'1e999' is no figure"),
        (table('"0","k","5","1.5","1"', header=HEADER, units=UNITS.replace("Mbyte", "MB")), "its unit is 'MB', expected byte"),
        (table('"0","k","5","1.5","1"', header=HEADER, units=UNITS.replace("Mbyte", "ns")), "its unit is 'ns', expected byte"),
        (table('"0","k","5","1","1"', header=HEADER.replace("dram__bytes_read.sum", CYCLES), units=UNITS), "2 columns of the name"),
        (table('"0","k","5","1","1","",""', header=HEADER + ',"",""', units=UNITS + ',"",""'), "2 columns of the name ''"),
        (table(f'"0","{"k" * 140_000}","5","1","1"', header=HEADER, units=UNITS), "at most 131,072 characters"),
        (table('"0","k","5","1","1', header=HEADER, units=UNITS), "damaged"),
        ("==ERROR== \x1b[31mno\n", r"\\x1b\[31mno"),
    ],
)
def test_what_is_no_table_is_refused_in_one_sentence(text, match):
    with pytest.raises(UsageError, match=match) as caught:
        nsight.parse(text)
    assert "\n" not in str(caught.value)


def test_counters_belong_to_a_measured_run(pingpong_run):
    with pytest.raises(ValueError, match="measured run"):
        nsight.with_counters(pingpong_run, [])
