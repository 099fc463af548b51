"""What was recorded on hardware is of the source that stands here, and says where it ran."""

import hashlib
import importlib
import json
from pathlib import Path
from statistics import mean

import pytest

import fasim.traces
from fasim.simulator.device import load_device

CALIBRATION = sorted((Path(fasim.traces.__file__).parent / "recorded" / "calibration").glob("*.json"))


@pytest.mark.parametrize("path", CALIBRATION, ids=lambda path: path.stem)
def test_a_calibration_is_of_todays_cuda_source(path):
    recorded = json.loads(path.read_text())
    source = importlib.import_module(f"fasim.kernels.calibrate.{path.stem}").source()
    assert recorded["source_sha256"] == hashlib.sha256(source.encode()).hexdigest()
    assert recorded["schema"] == "fasim.calibration/1"
    assert all(recorded[field] for field in ("device", "driver", "cuda", "packages", "date", "sm_clock_hz_seen"))


def test_what_softmax_and_wgmma_cost_each_other_is_the_mean_of_the_recorded_pairings():
    """Three fields of the H200 come from contention.json by a mean; this is how."""
    (path,) = (path for path in CALIBRATION if path.stem == "contention")
    cases = json.loads(path.read_text())["results"]["cases"]
    cycles = {name: [unit["median"] for unit in case["cycles_per_unit"].values()] for name, case in cases.items()}
    lost, later, dilated = [], [], []
    for name, found in cycles.items():
        width, *roles = name.split("_")
        softmax = [c for c, role in zip(found, roles, strict=True) if role == "softmax"]
        gemm = [c for c, role in zip(found, roles, strict=True) if role in ("qk", "pv")]
        if set(roles) - {"softmax", "qk", "pv"} or not softmax or not gemm:
            continue
        tensor = 4 * int(width[1:])  # cycles of one GEMM of the tile at the peak, d128
        alone = mean(cycles["_".join([width] + ["softmax"] * len(softmax))])
        lost.append((1 - alone / mean(softmax)) / (len(gemm) * tensor / mean(gemm)))
        if len(gemm) == 1:
            later.append(gemm[0] - cycles[f"{width}_{next(role for role in roles if role != 'softmax')}"][0])
        else:
            dilated.append(mean(gemm) / (len(gemm) * tensor) - 1)
    device = load_device("h200")
    assert device.tensor_interference == pytest.approx(mean(lost), abs=0.005)
    assert device.wgmma_contended_cycles == pytest.approx(mean(later), abs=1)
    assert device.wgmma_dilation == pytest.approx(mean(dilated), abs=0.001)
