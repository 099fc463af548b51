"""What if: a field or a resource of a device other than it is, and what follows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fasim.simulator.devices.changes import _HEADS, change
from fasim.simulator.devices.device import DEVICE_NAMES, FIELDS, load_device, sections
from fasim.simulator.devices.doubling import RESOURCES
from fasim.simulator.errors import UsageError
from fasim.simulator.predict import predict
from fasim.simulator.problem.workload import Workload
from fasim.simulator.results import metrics

H200 = load_device("h200")
BY_WHY = {"mufu": "MUFU", "tensor": "tensor cores", "issue": "issue", "smem": "shared memory", "l2": "L2", "hbm": "HBM",
          "power": "power limit", "launch": "launch"}  # fmt: skip


@pytest.mark.parametrize("name", BY_WHY)
def test_a_resource_twice_as_fast_is_what_why_predicts(name):
    wanted = replace(H200, **RESOURCES[BY_WHY[name]](H200))
    assert replace(change(H200, [f"{name}=x2"]).device, name=H200.name) == wanted


def test_the_time_moves_as_why_says():
    workload = Workload(1, 2, 256)
    why = {each.resource: each.time_s for each in predict(workload, "fa3", "h200", why=True).savings}
    for name in ("hbm", "launch"):
        assert metrics.time_s(predict(workload, "fa3", change(H200, [f"{name}=x2"]).device)) == why[BY_WHY[name]]


@pytest.mark.parametrize("device", DEVICE_NAMES)
@pytest.mark.parametrize("name", _HEADS)
def test_every_resource_has_a_field_that_it_is_known_by(device, name):
    gpu = load_device(device)
    head = _HEADS[name]
    assert head.field in head.follow(gpu, 2)
    assert head.follow(gpu, 1) == {field: getattr(gpu, field) for field in head.follow(gpu, 1)}


def test_the_field_of_a_resource_takes_the_rest_along_and_says_so():
    found = change(H200, ["hbm_bytes_per_s=9.6e12"])
    assert replace(found.device, name="h200") == replace(change(H200, ["hbm=x2"]).device, name="h200")
    assert "with it hbm_queue_cycles" in found.lines[0] and "stay" in found.lines[0]
    slower = change(H200, ["mufu_cycles=x2"]).device  # twice the cycles: half the rate
    assert slower.mufu_cycles == 2 * H200.mufu_cycles and slower.mufu_w == H200.mufu_w / 2


def test_any_other_field_changes_alone_and_says_so():
    found = change(H200, ["l2_bytes=x2"])
    assert found.device.l2_bytes == 2 * H200.l2_bytes
    assert [f for f in FIELDS if getattr(found.device, f) != getattr(H200, f)] == ["name", "l2_bytes"]
    assert "nothing follows" in found.lines[0]


def test_changes_add_up_and_the_name_says_them():
    found = change(H200, ["sms=x0.5", "power.tensor_w=100"])
    assert (found.device.sms, found.device.tensor_w) == (66, 100)
    assert found.device.name == "h200 with sms x0.5, tensor_w 100" and found.what == "sms x0.5, tensor_w 100"
    assert len(change(H200, ["hbm_bytes_per_s=x2", "tensor_flops_per_cycle=x2", "sms=x2"]).device.name) <= 64
    assert found.device.sources["sms"] == ("count", "changed by --set")
    assert change(H200, []).device is H200


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("hbm_byte_per_s=x2", "did you mean 'hbm_bytes_per_s'"),
        ("nothing_like_it=1", "`fasim devices h200` lists the fields"),
        ("tensor.hbm_bytes_per_s=x2", "is in section 'memory', not in 'tensor'"),
        ("dram.hbm_bytes_per_s=x2", "the sections are chip, memory, l2"),
        ("sms", "not of the form"),
        ("sms=", "not of the form"),
        ("mufu=x2,hbm=x2", "give each its own --set"),
        ("mufu=3", "takes a factor, as mufu=x2; or set mufu_cycles"),
        ("sms=many", "neither a number nor a factor"),
        ("sms=xx", "a factor is x and a number above zero"),
        ("sms=x-1", "a factor is x and a number above zero"),
        ("sms=1.5", "expected a whole number"),
        ("sms=1e9", "from 1 to 1,024"),
        ("mufu_cycles=0", "nothing takes no time"),
        ("idle_w=5000", "at most 'power_limit_w'"),
        ("name=mine", "is no figure"),
        ("hbm=xnan", "a factor is"),
        ("hbm_bytes_per_s=nan", "neither a number"),
    ],
)
def test_what_is_not_possible_is_a_sentence(setting, says):
    with pytest.raises(UsageError, match="^[^\n]+$") as found:
        change(H200, [setting])
    assert says in str(found.value)


def test_every_field_has_one_section():
    assert sections().keys() == FIELDS.keys()


def test_predict_says_what_the_change_does(fasim):
    small = ("--device", "h200", "--batch", "1", "--heads", "2", "--seqlen", "256")
    status, out, _ = fasim("predict", "fa3", *small, "--set", "launch=x2")
    assert status == 0
    first, second, *_ = out.splitlines()
    assert first.startswith("launch x2 saves fa3 ") and "% of its time" in first
    assert second.startswith("kernel_launch_cycles ") and "h200 with launch x2" in out
    status, out, err = fasim("predict", "fa3", "--set", "hbm_byte_per_s=x2")
    assert (status, out) == (2, "") and "did you mean 'hbm_bytes_per_s'" in err
