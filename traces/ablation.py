"""Ablation: what each mechanism of the model is worth, by the errors without it, on three sets of runs.

A mechanism is switched off by the device fields that describe it. It earns its place if the mean or the worst error of a
set that it was not made from grows without it. No field comes from any of these runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from ..simulator.devices.device import load_device
from ..simulator.results.run import Run
from . import store
from .compare import counterpart, tile_of
from .predictions import Advance, Question, predict_all

MECHANISMS: Mapping[str, Mapping[str, float]] = {
    "instructions are slower beside WGMMA": dict.fromkeys(
        (f"{pipe}_beside_wgmma_cycles" for pipe in ("issue", "fma", "alu", "mufu")), 0.0
    ),
    "instructions slow WGMMA down": {"wgmma_register_share": 0.0},
    "a GEMM begins later beside arithmetic": {"wgmma_beside_cycles": 0},
    "results wait for shared memory beside WGMMA": {
        "store_beside_most": 128.0, "store_beside_least": 128.0, "store_interference": 0.0,
        "load_beside_cycles": 0, "load_interference_least": 0.0, "load_interference_most": 0.0,
        "matrix_beside_most": 128.0, "matrix_beside_more": 128.0, "matrix_interference": 0.0,
    },
    "a GEMM takes time to issue": {"wgmma_issue_cycles": 0, "wgmma_step_issue_cycles": 0, "wgmma_step_issue_share": 0.0},
    "the tensor cores' queue is short": {"wgmma_queue_ksteps": 64},
    "a GEMM's result takes time to return": {"wgmma_latency_cycles": 0},
    "exponentials come nine cycles apart": {"mufu_spacing_cycles": 8},
    "chains of instructions, branches and votes": {
        "shuffle_latency_cycles": 1, "dependent_latency_cycles": 1, "mufu_latency_cycles": 1, "vote_cycles": 0,
        "branch_cycles": 0, "branch_beside_cycles": 0, "divide_cycles": 0,
    },
    "chains are slower beside others' arithmetic": {"chain_dilation": 0.0},
    "code is fetched": {"fetch_cycles": 0.0, "fetch_latency_cycles": 0},
    "a kernel's first pass finds its code in L2": {"cold_fetch_cycles": 0.0, "cold_fetch_latency_cycles": 0},
    "barriers take time": {
        "mbarrier_arrive_cycles": 1, "mbarrier_wait_cycles": 1, "mbarrier_issue_cycles": 1, "named_barrier_cycles": 1,
    },
    "loads take time to issue and to arrive": {"tma_issue_cycles": 1, "tma_latency_cycles": 1, "l2_hit_latency_cycles": 1},
    "loads wait for those of other SMs": {"l2_queue_cycles": 0.0, "hbm_queue_cycles": 0.0},
    "tiles are drawn from a queue in memory": {"draw_latency_cycles": 1},
    "launch and prologue": {"kernel_launch_cycles": 0, "cta_launch_cycles": 1, "setup_cycles": 1},
}  # fmt: skip
"""What the model has learnt, and the fields that switch it off."""
WHOLE = "whole model"
OURS, LATER, OTHERS = "ours", "ours, later", "others"


@dataclass(frozen=True)
class Errors:
    """Mean absolute and worst error of a set."""

    mean: float
    worst: float


@dataclass(frozen=True)
class Ablation:
    """The errors of each set with the whole model (`WHOLE`) and without each mechanism, and how many runs a set has."""

    device: str
    runs: dict[str, int]
    errors: dict[str, dict[str, Errors]]  # mechanism -> set -> errors

    def to_dict(self) -> dict:
        """As plain JSON values."""
        return {
            "device": self.device,
            "runs": self.runs,
            "errors": {without: {name: vars(each) for name, each in sets.items()} for without, sets in self.errors.items()},
        }


@dataclass(frozen=True)
class _Asked:
    """One run of a set: what to predict, and the cycles that were measured."""

    question: Question
    cycles: int

    def error(self, predicted: Run) -> float:
        """Of the predicted cycles."""
        return predicted.cycles / self.cycles - 1


def ablate(base: str = "h200", advance: Advance | None = None, processes: int = 1) -> Ablation:
    """Predict three sets once whole and once without each mechanism.

    "ours" is a third of our recorded runs, "ours, later" those that were recorded after most mechanisms had been made, "others"
    the recorded runs of other people's kernels for which a schedule stands. Raises UsageError where a recording cannot be read.
    """
    device = load_device(base)
    models = {WHOLE: device} | {name: replace(device, **fields) for name, fields in MECHANISMS.items()}
    sets = {OURS: _recorded(store.RECORDED, third=True), LATER: _recorded(store.BLIND, third=False), OTHERS: _of_others()}
    asked = {(name, each): replace(each.question, device=model) for name, model in models.items() for each in _all(sets)}
    found = predict_all(asked.values(), advance=advance, processes=processes)
    errors = {
        name: {kind: _errors([each.error(found[asked[name, each]]) for each in members]) for kind, members in sets.items()}
        for name in models
    }
    return Ablation(base, {kind: len(members) for kind, members in sets.items()}, errors)


def _all(sets: Mapping[str, list[_Asked]]) -> list[_Asked]:
    return [each for members in sets.values() for each in members]


def _errors(each: list[float]) -> Errors:
    return Errors(fmean(map(abs, each)), max(each, key=abs))


def _recorded(folder: Path, third: bool) -> list[_Asked]:
    runs = [run for run in store.load_folder(folder).values() if run.measurement.implementation == "cuda"]
    chosen = [run for run in runs if not third or _is_of_the_third(run)]
    return [_Asked(Question(run.workload, run.schedule, tile=tile_of(run)), run.cycles) for run in chosen]


def _is_of_the_third(run: Run) -> bool:
    """A fixed third, by the SHA-256 of schedule and workload: sixteen times all would take long."""
    key = json.dumps([run.schedule, run.workload.to_dict()], sort_keys=True)
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 3 == 0


def _of_others() -> list[_Asked]:
    runs = [(run, counterpart(name, run, None)[0]) for name, run in store.load_folder(store.PEERS).items()]
    return [_Asked(Question(run.workload, schedule, tile=tile_of(run)), run.cycles) for run, schedule in runs if schedule]
