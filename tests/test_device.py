"""Device files: the built-in ones load with a source per field; a broken one of a user's is one clear sentence."""

from pathlib import Path

import pytest

from fasim.simulator.devices import device as device_module
from fasim.simulator.devices.device import DEVICE_NAMES, FIELDS, load_device
from fasim.simulator.errors import UsageError

BUILT_IN = Path(device_module.__file__).parent


@pytest.mark.parametrize("name", DEVICE_NAMES)
def test_a_built_in_device_has_a_unit_and_a_source_for_every_field(name):
    device = load_device(name)
    assert device.sources.keys() == FIELDS.keys()
    for field, (unit, source) in device.sources.items():
        assert unit == FIELDS[field].metadata["unit"]
        assert len(source) >= 5, field


def test_every_device_file_is_offered_by_name():
    assert {path.stem for path in BUILT_IN.glob("*.toml")} == set(DEVICE_NAMES)


@pytest.mark.parametrize(
    ("name", "tflops", "clock_hz"),
    [("h200", 989.4, 1.83e9), ("h100-sxm", 989.4, 1.83e9), ("h100-pcie", 756.0, 1.62e9), ("a100-sxm", 312.0, 1.41e9)],
)
def test_the_tensor_peak_is_the_datasheets(name, tflops, clock_hz):
    device = load_device(name)
    assert device.sms * device.tensor_flops_per_cycle * clock_hz / 1e12 == pytest.approx(tflops, rel=2e-3)


def test_the_pipes_hold_what_the_programming_guide_says():
    hopper, ampere = load_device("h200"), load_device("a100-sxm")

    def lanes(device, cycles):
        return 4 * 32 / getattr(device, cycles)

    assert (lanes(hopper, "mufu_cycles"), lanes(ampere, "mufu_cycles")) == (16, 16)
    assert (lanes(hopper, "fma_cycles"), lanes(ampere, "fma_cycles")) == (128, 64)


def test_h100_sxm_is_an_h200_but_for_memory_and_l2():
    h100, h200 = load_device("h100-sxm"), load_device("h200")
    different = {field for field in FIELDS if getattr(h100, field) != getattr(h200, field)}
    assert different == {"name", "memory_bytes", "hbm_bytes_per_s", "l2_bytes"}


def test_fp8_on_ampere_is_refused():
    assert load_device("h200").tensor_rate(1) == 2 * load_device("h200").tensor_rate(2)
    with pytest.raises(UsageError, match="a100-sxm has no fp8"):
        load_device("a100-sxm").tensor_rate(1)


def test_a_users_file_changes_only_what_it_gives(tmp_path):
    path = tmp_path / "half.toml"
    path.write_text('base = "h200"\n[chip]\nsms = {value = 66, unit = "count", source = "half a chip"}\n')
    device, base = load_device(str(path)), load_device("h200")
    assert device.sms == 66
    assert device.sources["sms"] == ("count", "half a chip")
    assert device.name == "half", "a variant goes by its file's name"
    assert {field for field in FIELDS if getattr(device, field) != getattr(base, field)} == {"name", "sms"}


def test_a_users_file_may_stand_alone_and_without_sections(tmp_path):
    lines = [line for line in (BUILT_IN / "h200.toml").read_text().splitlines() if not line.startswith(("#", "["))]
    path = tmp_path / "mine.toml"
    path.write_text("\n".join(lines))
    assert load_device(str(path)) == load_device("h200")


def test_whole_numbers_serve_where_a_real_one_is_asked(tmp_path):
    path = tmp_path / "d.toml"
    path.write_text('base = "h200"\npower_limit_w = {value = 500, unit = "W", source = "a lower cap"}\n')
    limit = load_device(str(path)).power_limit_w
    assert limit == 500.0
    assert isinstance(limit, float)




def value(field: str, given: object, unit: str) -> str:
    """An H200 with one field changed."""
    return f'base = "h200"\n{field} = {{value = {given}, unit = "{unit}", source = "s"}}'


SMS = 'sms = {value = 132, unit = "count", source = "s"}'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SMS, ["'name' is missing", "base"]),
        ('base = "h200"\nsmms = {value = 1, unit = "count", source = "s"}', ["unknown field 'smms'"]),
        ('base = "h200"\n[chip]\nsmms = {value = 1, unit = "count", source = "s"}', ["unknown field 'smms'"]),
        ('base = "h200"\nsms = 132', ["'sms'", "value", "unit", "source"]),
        ('base = "h200"\nsms = {unit = "count", source = "s"}', ["'sms'", "value"]),
        ('base = "h200"\nsms = {value = "many", unit = "count", source = "s"}', ["'sms'", "'many'", "whole number"]),
        ('base = "h200"\nsms = {value = 13.5, unit = "count", source = "s"}', ["'sms'", "13.5", "whole number"]),
        ('base = "h200"\nsms = {value = true, unit = "count", source = "s"}', ["'sms'", "True", "whole number"]),
        ('base = "h200"\nsms = {value = 132, unit = "SM", source = "s"}', ["'sms'", "'SM'", "'count'"]),
        ('base = "h200"\nsms = {value = 132, source = "s"}', ["'sms'", "unit None", "'count'"]),
        ('base = "h200"\nsms = {value = 132, unit = "count"}', ["'sms'", "no source"]),
        ('base = "h200"\nsms = {value = 132, unit = "count", source = " "}', ["'sms'", "no source"]),
        ('base = "h200"\nsms = {value = 132, unit = "count", source = "s", date = "x"}', ["'sms'", "'date'"]),
        ('base = "h200"\nsms = {value = 0, unit = "count", source = "s"}', ["'sms'", "1 to 1,024"]),
        ('base = "h200"\nsms = {value = -2, unit = "count", source = "s"}', ["'sms'", "1 to 1,024"]),
        ('base = "h200"\nidle_w = {value = -2, unit = "W", source = "s"}', ["'idle_w'", "-2", "0 to 10,000"]),
        ('base = "h200"\nhbm_efficiency = {value = 1.2, unit = "ratio", source = "s"}', ["'hbm_efficiency'", "0.01 to 1"]),
        (value("hbm_bytes_per_s", "nan", "B/s"), ["hbm_bytes_per_s", "expected a number from"]),
        (value("hbm_bytes_per_s", "inf", "B/s"), ["hbm_bytes_per_s", "expected a number from"]),
        ('base = "h200"\nname = {value = "", unit = "name", source = "s"}', ["'name'", "''", "expected a name"]),
        (
            'base = "h200"\narchitecture = {value = "volta", unit = "name", source = "s"}',
            ["'volta'", "hopper", "ampere"],
        ),
        (f'base = "h200"\n{SMS}\n[chip]\n{SMS}', ["'sms' is given twice"]),
        ('base = "b200"', ["base='b200'", "h200"]),
        ("base = 3", ["base=3", "h200"]),
        ("sms = {", ["not valid TOML"]),
        (value("hbm_bytes_per_s", 1e-12, "B/s"), ["'hbm_bytes_per_s'", "1e-12", "1e+09"]),
        (value("l2_bytes_per_cycle", 1e-12, "B/cycle"), ["'l2_bytes_per_cycle'", "1 to 100,000"]),
        (value("l2_ways", 1_000_000, "count"), ["'l2_ways'", "1000000", "1 to 128"]),
        (value("l2_bytes", 1 << 70, "B"), ["'l2_bytes'", str(1 << 70)]),
        (value("l2_bytes", "9" * 4000, "B"), ["'l2_bytes'", "digits"]),
        (value("l2_bytes", "9" * 5000, "B"), ["not valid TOML", "4300"]),
        (value("fp8_ratio", 0.001, "ratio"), ["'fp8_ratio'", "0 where there is no fp8"]),
        (value("idle_w", 800, "W"), ["'idle_w'", "'power_limit_w'", "700"]),
        (value("smem_bytes_per_cta", 1 << 20, "B"), ["'smem_bytes_per_cta'", "'smem_bytes_per_sm'"]),
        (value("name", '"a/b.toml"', "name"), ["'name'", "not a path"]),
        (value("name", '"a\\u001b[31mb"', "name"), ["'name'", "U+001B"]),
        ('base = "h200"\nsms = {value = 9, unit = "count", source = "a\\u202eb"}', ["'sms'", "U+202E"]),
        ('base = "h200"\nsms = {value = [[[1]]], unit = "count", source = "s"}', ["'sms'", "a list of 1"]),
        ('base = "h200"\nsms = {value = 2026-01-01, unit = ["count"], source = "s"}', ["'sms'", "unit a list"]),
        ("x = " + "[" * 3000 + "]" * 3000, ["nested deeper than"]),
        ("x = " + "{a = " * 3000 + "1" + "}" * 3000, ["nested deeper than"]),
        (".".join("a" * 500) + " = 1", ["nested deeper than"]),
        (".".join(['"a"'] * 500) + " = 1", ["nested deeper than"]),
        ("\n".join(f"[{'.'.join('a' * n)}]" for n in range(1, 60)), ["nested deeper than"]),
    ],
)
def test_a_broken_device_file_is_one_sentence_naming_file_and_field(tmp_path, text, words):
    path = tmp_path / "broken.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_device(str(path))
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    for word in words:
        assert word in message


def test_what_is_not_a_readable_file_is_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        load_device(str(tmp_path / "none.toml"))
    with pytest.raises(UsageError, match="cannot be read"):
        load_device(str(tmp_path) + "/")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="no text"):
        load_device(str(binary))
    with pytest.raises(UsageError, match="'b200' is not known.*h100-sxm.*a100-sxm"):
        load_device("b200")


def test_a_byte_order_mark_and_windows_lines_are_no_fault(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b'\xef\xbb\xbfbase = "h200"\r\nsms = {value = 66, unit = "count", source = "s"}\r\n')
    assert load_device(str(path)).sms == 66


def test_a_variant_goes_by_its_files_name_made_plain(tmp_path):
    path = tmp_path / "half \x1b[31m, of it.toml"
    path.write_text('base = "h200"')
    assert load_device(str(path)).name == "half --31m, of it"


def test_a_built_in_name_never_opens_a_path(tmp_path):
    with pytest.raises(UsageError, match="not known"):
        device_module.built_in(str(tmp_path / "x.toml"))
    assert device_module.built_in("h200") == load_device("h200")
