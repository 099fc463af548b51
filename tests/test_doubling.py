"""One resource twice as fast: the table says what a prediction on such a device says."""

from dataclasses import fields, replace

import pytest

from fasim.simulator.clock import Rates, power_w
from fasim.simulator.devices.device import DEVICE_NAMES, Device, load_device
from fasim.simulator.devices.doubling import RESOURCES
from fasim.simulator.predict import predict
from fasim.simulator.problem.workload import Workload
from fasim.simulator.results import metrics

WORKLOAD = Workload(2, 16, 1024)
UNIT = {"FLOP/cycle": 2, "W": 2, "B/cycle": 2, "B/s": 2, "1/cycle": 2, "cycles": 0.5}
"""Unit of a field -> what becomes of it where its resource is twice as fast."""


def edited(tmp_path, base: str, changed: dict) -> str:
    """A device file that starts from another and gives the changed fields, as a user writes it."""
    units = {f.name: f.metadata["unit"] for f in fields(Device) if "unit" in f.metadata}
    lines = [f'base = "{base}"', 'name = {value = "edited", unit = "name", source = "test"}']
    lines += [f'{name} = {{value = {value!r}, unit = "{units[name]}", source = "test"}}' for name, value in changed.items()]
    path = tmp_path / "edited.toml"
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture(scope="module")
def explained():
    return predict(WORKLOAD, "warp-specialized", "h100-sxm", why=True)


@pytest.mark.parametrize("resource", RESOURCES)
def test_the_saving_is_what_a_device_edited_by_hand_predicts(tmp_path, explained, resource):
    saving = next(each for each in explained.savings if each.resource == resource)
    other = predict(WORKLOAD, "warp-specialized", edited(tmp_path, "h100-sxm", saving.changed))
    assert saving.time_s == metrics.time_s(other)
    assert saving.saved == pytest.approx(1 - metrics.time_s(other) / metrics.time_s(explained))


@pytest.mark.parametrize("name", DEVICE_NAMES)
@pytest.mark.parametrize("resource", RESOURCES)
def test_every_field_that_changes_is_twice_or_half_of_what_it_was(name, resource):
    device = load_device(name)
    changed = RESOURCES[resource](device)
    assert changed
    for field, value in changed.items():
        before, unit = getattr(device, field), device.sources[field][0]
        if field == "mufu_spacing_cycles":  # what lies between two exponentials beside the exponential stays
            assert before - value == device.mufu_cycles - changed["mufu_cycles"]
        else:
            assert abs(value - before * UNIT[unit]) < 1, field


def test_each_resource_shortens_a_workload_that_waits_for_it():
    def saved(resource, workload, schedule="fa3", **asked):
        found = predict(workload, schedule, "h100-sxm", why=True, **asked).savings
        return next(each.saved for each in found if each.resource == resource)

    assert saved("MUFU", Workload(2, 33, 2048, 64)) > 0.05  # beside WGMMA the rest of the softmax stays
    assert saved("tensor cores", Workload(1, 33, 2048), clock_hz=1.2e9) > 0.1
    assert saved("HBM", Workload(4, 33, seqlen_q=1, seqlen_k=4096)) > 0.13
    assert saved("power limit", Workload(1, 33, 2048)) > 0.15
    assert saved("power limit", Workload(1, 33, 2048), clock_hz=1.2e9) == 0
    assert saved("launch", Workload(1, 1, 128)) > 0.15


def test_a_unit_twice_as_fast_takes_no_more_energy_for_its_work():
    """Half the time at twice the watts: joules stay but for the voltage, which follows the tensor cores' activity a little."""
    device = load_device("h100-sxm")
    for resource, rates in (
        ("MUFU", Rates(mufu=0.5)),
        ("tensor cores", Rates(tensor=0.4, smem_bytes_per_cycle=40.0)),
        ("shared memory", Rates(smem_bytes_per_cycle=40.0)),
    ):
        twice = replace(device, **RESOURCES[resource](device))
        halved = replace(rates, tensor=rates.tensor / 2, mufu=rates.mufu / 2)
        clock = 1.2e9
        before, after = (power_w(d, r, clock) - power_w(d, Rates(), clock) for d, r in ((device, rates), (twice, halved)))
        assert after == pytest.approx(before, rel=0.05), resource
