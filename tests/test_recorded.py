"""What was recorded on hardware is of the source that stands here, and says where it ran."""

import hashlib
import importlib
import json
from pathlib import Path

import pytest

import fasim.traces

CALIBRATION = sorted((Path(fasim.traces.__file__).parent / "recorded" / "calibration").glob("*.json"))


@pytest.mark.parametrize("path", CALIBRATION, ids=lambda path: path.stem)
def test_a_calibration_is_of_todays_cuda_source(path):
    recorded = json.loads(path.read_text())
    source = importlib.import_module(f"fasim.kernels.calibrate.{path.stem}").source()
    assert recorded["source_sha256"] == hashlib.sha256(source.encode()).hexdigest()
    assert recorded["schema"] == "fasim.calibration/1"
    assert all(recorded[field] for field in ("device", "driver", "cuda", "packages", "date", "sm_clock_hz_seen"))
