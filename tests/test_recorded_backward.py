"""The backwards recorded on an H200: every run of the plans is there, was right, was counted, and says what it was of."""

from __future__ import annotations

import json
from hashlib import sha256
from itertools import permutations
from pathlib import Path
from statistics import geometric_mean

import pytest

import fasim
from fasim.simulator.predict import predict
from fasim.simulator.problem.workload import Workload
from fasim.simulator.results import metrics
from fasim.simulator.schedules import BACKWARD
from fasim.traces import nsight, store
from fasim.traces.compare import compare_all

pytest.importorskip("torch")

from fasim.kernels import backward
from fasim.kernels.measure import peers, plan
from fasim.kernels.validation import subjects, suite

ROOT = Path(fasim.__file__).parent
PLACE = ROOT / "traces" / "recorded" / "backward"
KERNELS = PLACE.parent / "kernels"
RUNS = store.load_folder(PLACE)
THEIRS = {name: run for name, run in RUNS.items() if peers.is_peer(run.schedule)}


def test_every_run_of_the_plan_of_peers_is_there():
    wanted = {(entry.kernel, entry.workload) for entry in plan.read(PLACE / "plan.toml")}
    assert {(run.schedule, run.workload) for run in THEIRS.values()} == wanted and len(wanted) >= 40


@pytest.mark.parametrize("name", RUNS)
def test_a_run_was_right_and_says_where_and_of_what_it_is(name):
    run, taken = RUNS[name], RUNS[name].measurement
    assert run.workload.backward and taken.gpu == "NVIDIA H200" and taken.driver and taken.date
    assert taken.relative_error < 8e-3 and taken.sources and taken.packages["torch"]
    assert (taken.regime, taken.l2) == ("sustained", "cold") and name == store.file_name(run).removesuffix(".run.json")


@pytest.mark.parametrize("name", RUNS)
def test_all_kernels_of_a_call_were_counted_and_the_main_one_apart(name):
    run, taken = RUNS[name], RUNS[name].measurement
    counters, cycles = taken.counters, [each for _, each in taken.kernels]
    assert set(nsight.NEEDED) <= counters.keys() and {nsight.MAIN + metric for metric in nsight.NEEDED} <= counters.keys()
    assert len(cycles) > 1 and sum(cycles) == run.cycles == counters[nsight.CYCLES]
    assert max(cycles) == counters[nsight.MAIN + nsight.CYCLES] > run.cycles / 2
    assert counters[nsight.MAIN + nsight.HBM_READ] < counters[nsight.HBM_READ]


def test_flash_attentions_runs_have_the_tile_that_their_kernels_take():
    tiles = {(run.workload.head_dim, run.workload.causal): run.tile for run in THEIRS.values() if run.schedule == "peer:fa4"}
    assert {key: (tile.block_m, tile.block_n) for key, tile in tiles.items()} == {
        (64, False): (128, 128), (64, True): (128, 128), (128, False): (80, 128), (128, True): (64, 128),
        (256, False): (64, 48), (256, True): (64, 48),
    }  # fmt: skip
    for run in THEIRS.values():
        if run.schedule == "peer:fa2":
            (name,) = (each for each, cycles in run.measurement.kernels if cycles == max(c for _, c in run.measurement.kernels))
            assert run.tile == peers.tile_of(name) and run.tile.stages == 2


@pytest.mark.parametrize("mask", ["", "causal-"], ids=["full", "causal"])
def test_the_model_has_flash_attention_4s_main_kernel_and_its_bytes(mask):
    name = f"peer-fa4-peer-b3h10s3000d128-bf16-{mask}backward-sustained"
    (found,) = compare_all({name: RUNS[name]}).comparisons
    assert found.predicted.schedule == "fa3" and found.predicted.tile == RUNS[name].tile
    for quantity, allowed in (("main kernel", 0.06), ("time", 0.05), ("HBM read", 0.04), ("HBM written", 0.04), ("L2 read", 0.01)):
        assert abs(found.row(quantity).error) <= allowed, quantity


@pytest.mark.parametrize(
    ("shape", "schedule", "allowed"),
    [
        ("peer-cudnn-peer-b16h16s1024d128-bf16-causal", "cudnn", 0.07), ("peer-cudnn-peer-b4h16s4096d128-bf16", "cudnn", 0.06),
        ("peer-fa4-peer-b16h32s1024d64-bf16", "fa3", 0.02), ("peer-fa4-peer-b16h8s1024d256-bf16", "narrow", 0.07),
    ],
)  # fmt: skip
def test_the_model_has_other_peoples_main_kernels(shape, schedule, allowed):
    name = f"{shape}-backward-sustained"
    (found,) = compare_all({name: RUNS[name]}).comparisons
    assert found.predicted.schedule == schedule and found.predicted.tile == RUNS[name].tile
    assert abs(found.row("main kernel").error) <= allowed and abs(found.row("time").error) <= 0.07
    assert abs(found.row("tensor cores").error) <= 0.06 and abs(found.row("L2 read").error) <= 0.01


# -- ours, validated ---

VALIDATION = PLACE / "validation"


def listed(name: str) -> dict[str, str]:
    """Path -> digest."""
    return {path: digest for digest, path in map(str.split, (VALIDATION / f"{name}.sha256").read_text().splitlines())}


SOURCES, LATE, LATER = listed("sources"), listed("late"), listed("later")
"""Texts with which `lagged`, `apart` and `relay` were validated; `late`; and texts since, of which test_cuda_backward holds the
machine code of what was validated to what it was."""
KERNELS_OF_OURS = ("lagged", "apart", "relay", "late")
MODES = tuple(f"{name}-backward{how}" for name in KERNELS_OF_OURS for how in ("", "-deterministic"))


def read(name: str) -> dict:
    """A record of traces/recorded/backward/validation."""
    return json.loads((VALIDATION / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("dtype", subjects.HALF)
@pytest.mark.parametrize("mode", MODES)
def test_our_backward_passed_the_whole_suite_in_both_modes_and_dtypes(mode, dtype):
    report = read(f"{mode}-{dtype}")
    assert "H200" in report["device"] and not report["quick"]
    passed = {check["group"] for check in report["checks"] if check["verdict"] == "pass"}
    failed = [check for check in report["checks"] if check["verdict"] == "fail"]
    assert set(suite.GROUPS) <= passed and not failed


@pytest.mark.parametrize(("endured", "rows", "sources"), [("endurance_backward", 44, SOURCES), ("endurance_late", 14, LATE)])
def test_our_backward_endured_and_every_record_is_of_the_same_sources(endured, rows, sources):
    record = read(endured)
    assert len(record["rows"]) == rows and all(row["passed"] and row["runs"] >= 200 for row in record["rows"])
    for row in record["rows"]:
        if row["deterministic"]:
            assert row["differ"] == row["dq_strays"] == 0
    named = {f"kernels/cuda/backward/{name}": digest for name, digest in record["kernel_sha256"].items()}
    if sources is SOURCES:
        named |= json.loads((KERNELS / "backward_h200.json").read_text(encoding="utf-8"))["kernel_sha256"]
    shared = named.keys() & sources.keys()
    assert len(shared) >= 15 and all(named[path] == sources[path] for path in shared)


@pytest.mark.parametrize("kernel", KERNELS_OF_OURS)
def test_the_sanitizer_found_no_access_out_of_bounds_and_no_race(kernel):
    found = {check["case"]: check for check in read(f"sanitize-{kernel}-backward")["checks"] if check["group"] == "sanitize"}
    assert {check["verdict"] for check in found.values()} == {"pass"}
    assert found.keys() == {"memcheck: accesses out of bounds", "racecheck: races in shared memory"}


def test_what_auto_takes_is_what_was_validated():
    longer = [(kind, schedule) for table in (backward.LONG, backward.SAME_BITS) for kind, (_, schedule) in table.items()]
    taken = [*backward.READY.items(), *longer]
    assert {schedule for _, schedule in taken} <= set(KERNELS_OF_OURS)
    for schedule in {schedule for _, schedule in taken}:
        for path in subjects.resolve(f"{schedule}-backward").sources:
            name = path.resolve().relative_to(ROOT).as_posix()
            known = {each[name] for each in (LATE if schedule == "late" else SOURCES, LATER) if name in each}
            if name.startswith("kernels/cuda/backward/") and known:  # or it is of another schedule
                assert sha256(path.read_bytes()).hexdigest() in known, f"{name} has changed since: validate it again"


def test_the_times_beside_peers_are_of_right_kernels_at_every_row_of_the_table():
    rows = json.loads((KERNELS / "backward_h200.json").read_text(encoding="utf-8"))["rows"]
    ours = {"lagged", "apart", "apart-deterministic", "relay"}
    assert {row["kernel"] for row in rows} == ours | {"peer:fa4", "peer:cudnn"} and len(rows) == 5 * 16 + 3 * 6
    assert all(row["relative_error"] < 8e-3 and row["tflops"] > 0 for row in rows)
    assert all(row["sm_clock_mhz"] > 1000 for row in rows)


@pytest.mark.parametrize(("head_dims", "mean"), [((128,), 1.04), ((64, 128), 1.05)], ids=str)
def test_what_auto_takes_is_faster_than_the_better_peer_of_each_row(head_dims, mean):
    times: dict[tuple, dict[str, float]] = {}
    for record, head_dim in (("backward_late_h200", 128), ("backward_h200", 64)):
        for row in json.loads((KERNELS / f"{record}.json").read_text(encoding="utf-8"))["rows"]:
            if row["head_dim"] == head_dim and head_dim in head_dims:
                times.setdefault((head_dim, row["causal"], row["seqlen_q"]), {})[row["kernel"]] = row["tflops"]
    found = []
    for (head_dim, causal, length), tflops in times.items():
        kind = "bf16", head_dim, causal
        least, longer = backward.LONG.get(kind, (length + 1, ""))
        schedule = longer if length >= least else backward.READY[kind]
        found.append(tflops[schedule] / max(rate for kernel, rate in tflops.items() if kernel.startswith("peer:")))
    assert len(found) == sum({64: 6, 128: 10}[head_dim] for head_dim in head_dims)
    assert geometric_mean(found) >= mean and min(found) >= 1.0


# -- the model's ranks ---

ORDER = {"apart": "apart", "lagged": "lagged", "relay": "relay", "peer:fa4": "fa3", "peer:cudnn": "cudnn"}
"""A kernel of the table of times -> the schedule whose prediction stands for it."""


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_backwards_that_differ_by_a_tenth_rank_in_the_prediction_as_measured(head_dim):
    """Of the lengths recorded the shortest; closer ones the model does not tell apart (schedules/backward/NOTES.md)."""
    rows = json.loads((KERNELS / "backward_h200.json").read_text(encoding="utf-8"))["rows"]
    pairs = 0
    for causal in (False, True):
        times = {}
        for row in rows:
            shape = row["head_dim"], row["seqlen_q"], row["causal"], row["pass"]
            if shape != (head_dim, 1024, causal, "backward") or row["kernel"] not in ORDER or "tflops" not in row:
                continue
            schedule = ORDER[row["kernel"]]
            if head_dim == 256 and schedule == "fa3":
                schedule = "narrow"
            if head_dim not in BACKWARD[schedule].head_dims:
                continue
            workload = Workload(row["batch"], row["heads"], 1024, head_dim, row["dtype"], causal, direction="backward")
            predicted = predict(workload, schedule, "h200", regime="burst", spans=False)
            times[row["kernel"]] = 1 / row["tflops"], metrics.time_s(predicted)
        for (fast, (seen, said)), (slow, (others, theirs)) in permutations(times.items(), 2):
            if others > 1.1 * seen:
                pairs += 1
                assert said < theirs, f"{fast} is {others / seen - 1:.0%} faster than {slow}, predicted the other way"
    assert pairs
