"""kernels/compile/build.py: what is compiled once is found again, and what is wrong is said with file and line. No GPU."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest

from fasim.kernels.compile import build
from fasim.simulator.errors import UsageError

needs_nvrtc = pytest.mark.skipif(build.compiler_version() is None, reason="NVRTC is not installed")

TEXT = """
#include "offset.cuh"
extern "C" __constant__ int attention_smem_bytes = 1000 * WIDTH;
extern "C" __global__ void attention_forward(float* o) {
  __shared__ float s[WIDTH];
  s[threadIdx.x] = o[threadIdx.x];
  __syncthreads();
  o[threadIdx.x] = s[(threadIdx.x + OFFSET) % WIDTH];
}
"""
SOURCE = build.Source("turn.cu", TEXT, {"offset.cuh": "#define OFFSET 3\n"}, {"WIDTH": 64})


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASIM_CACHE_DIR", str(tmp_path))
    return tmp_path / "cubin"


@pytest.fixture
def no_compiler(monkeypatch):
    """From here on, compiling anything fails the test."""

    def forbid():
        def compiling(source):
            raise AssertionError(f"{source.name} was compiled again")

        monkeypatch.setattr(build, "_compile", compiling)

    return forbid


@needs_nvrtc
def test_a_second_build_compiles_nothing_and_gives_the_same_bytes(no_compiler):
    first = build.build(SOURCE)
    no_compiler()
    again = build.build(SOURCE)
    assert (first.cached, again.cached) == (False, True)
    assert again.cubin == first.cubin and again.report == first.report


@needs_nvrtc
def test_a_second_process_compiles_nothing(own_cache):
    code = (
        "from fasim.kernels.compile import build; import test_build\n"
        "build._compile = None\n"
        "raise SystemExit(0 if build.build(test_build.SOURCE).cached else 1)"
    )
    build.build(SOURCE)
    path = os.pathsep.join([os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr


@needs_nvrtc
@pytest.mark.parametrize(
    "change",
    [
        {"text": TEXT + "// one more line\n"},
        {"headers": {"offset.cuh": "#define OFFSET 4\n"}},
        {"headers": {**SOURCE.headers, "unused.cuh": ""}},
        {"defines": {"WIDTH": 128}},
        {"fast_math": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_the_cubin_depends_on_is_part_of_the_key(change):
    build.build(SOURCE)
    assert build.lookup(replace(SOURCE, **change)) is None


@needs_nvrtc
def test_another_compiler_version_is_another_entry(monkeypatch):
    build.build(SOURCE)
    monkeypatch.setattr(build, "_version", ["99.0"])
    assert build.lookup(SOURCE) is None


@needs_nvrtc
@pytest.mark.parametrize("suffix", [".cubin", ".json"])
@pytest.mark.parametrize("damage", [b"", b"\x7fELF nonsense", None], ids=["empty", "garbage", "absent"])
def test_a_damaged_entry_is_rebuilt(own_cache, suffix, damage):
    first = build.build(SOURCE)
    (victim,) = own_cache.glob(f"*{suffix}")
    victim.write_bytes(damage) if damage is not None else victim.unlink()
    again = build.build(SOURCE)
    assert not again.cached and again.cubin == first.cubin
    assert build.build(SOURCE).cached


FOREIGN = {
    "deep": lambda entry: "[" * 100_000,
    "long": lambda entry: json.dumps(entry) + " " * (1 << 20),
    "a list": lambda entry: "[]",
    "many registers": lambda entry: json.dumps(entry | {"report": entry["report"] | {"registers": "many"}}),
    "true registers": lambda entry: json.dumps(entry | {"report": entry["report"] | {"registers": True}}),
    "negative bytes": lambda entry: json.dumps(entry | {"report": entry["report"] | {"dynamic_smem_bytes": -1}}),
    "huge bytes": lambda entry: json.dumps(entry | {"report": entry["report"] | {"dynamic_smem_bytes": 10**30}}),
    "remarks of numbers": lambda entry: json.dumps(entry | {"report": entry["report"] | {"remarks": [1]}}),
    "no compiler": lambda entry: json.dumps(entry | {"report": entry["report"] | {"compiler": None}}),
    "one field more": lambda entry: json.dumps(entry | {"report": entry["report"] | {"clock": 1}}),
}


@needs_nvrtc
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_report_that_is_none_is_rebuilt(own_cache, kind):
    first = build.build(SOURCE)
    (victim,) = own_cache.glob("*.json")
    victim.write_text(FOREIGN[kind](json.loads(victim.read_text())))
    again = build.build(SOURCE)
    assert not again.cached and again.report == first.report
    assert build.build(SOURCE).cached


@needs_nvrtc
def test_without_a_home_kernels_are_compiled_and_not_kept(monkeypatch):
    monkeypatch.delenv("FASIM_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(build.Path, "home", homeless)
    with pytest.warns(build.BuildWarning, match="there is no home directory.*FASIM_CACHE_DIR"):
        assert not build.build(SOURCE).cached


@needs_nvrtc
def test_microbenchmarks_are_kept_beside_the_kernels_and_as_carefully(own_cache, no_compiler):
    from fasim.kernels.calibrate import harness

    text = 'extern "C" __global__ void probe(float* p) { p[threadIdx.x] = 1; }'
    cubin = harness.compile_cubin(text)
    (entry,) = own_cache.glob("*.json")
    assert "nvrtc" in entry.name and hashlib.sha256(cubin).hexdigest() in entry.read_text()
    no_compiler()
    assert harness.compile_cubin(text) == cubin


@needs_nvrtc
def test_no_half_written_file_is_left_behind(own_cache):
    build.build(SOURCE)
    assert sorted(path.suffix for path in own_cache.iterdir()) == [".cubin", ".json"]


@needs_nvrtc
def test_the_report_has_what_ptxas_said_and_what_the_source_exports(own_cache):
    report = build.build(SOURCE).report
    assert 0 < report.registers <= 255
    assert (report.spill_bytes, report.stack_bytes) == (0, 0)
    assert (report.static_smem_bytes, report.dynamic_smem_bytes) == (64 * 4, 64 * 1000)
    assert report.smem_bytes == 64 * 4 + 64 * 1000
    (entry,) = own_cache.glob("*.json")
    assert json.loads(entry.read_text())["report"]["registers"] == report.registers


@needs_nvrtc
def test_spills_are_reported():
    live = " ".join(f"float x{i} = p[{i} * n];" for i in range(120))
    used = " ".join(f"p[{i} * n + n] = x{i} * x{119 - i};" for i in range(120))
    head = 'extern "C" __global__ void __launch_bounds__(1024, 2) attention_forward(float* p, int n)'
    source = build.Source("spills.cu", f"{head} {{ {live} __syncthreads(); {used} }}")
    assert build.build(source).report.spill_bytes > 0


@needs_nvrtc
def test_remarks_of_the_compiler_are_warnings_once_and_stay_in_the_report():
    text = 'extern "C" __global__ void attention_forward(float* p) { int unused; p[0] = 1; }'
    source = build.Source("remark.cu", text)
    with pytest.warns(build.BuildWarning, match=r"remark\.cu\(1\): warning .*unused"):
        first = build.build(source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = build.build(source)
    assert first.report.remarks == again.report.remarks and len(first.report.remarks) == 1


@needs_nvrtc
def test_a_compile_error_is_one_sentence_and_the_first_errors_with_file_and_line():
    text = TEXT.replace("o[threadIdx.x];", "nothing[threadIdx.x];")
    broken = replace(SOURCE, text=text, headers={"offset.cuh": "\nint OFFSET = what;\n"})
    with pytest.raises(build.CompileError) as caught:
        build.build(broken)
    first, *errors = str(caught.value).splitlines()
    assert first == "turn.cu does not compile with -DWIDTH=64:"
    assert any(line.strip().startswith("offset.cuh(2): error") for line in errors)
    assert any(line.strip().startswith("turn.cu(6): error") and "nothing" in line for line in errors)
    assert len(errors) <= 6 and isinstance(caught.value, UsageError)


@needs_nvrtc
def test_an_error_of_ptxas_is_readable_too():
    text = 'extern "C" __global__ void attention_forward() { asm volatile("no.such.instruction;"); }'
    with pytest.raises(build.CompileError, match=r"(?s)ptx\.cu does not compile.*Not a name of any known instruction"):
        build.build(build.Source("ptx.cu", text))


@needs_nvrtc
def test_several_sources_compile_together_and_an_error_stays_in_its_place():
    broken = build.Source("broken.cu", "nonsense")
    seen = []
    good, bad, last = build.build_all([SOURCE, broken, replace(SOURCE, defines={"WIDTH": 32})], lambda *at: seen.append(at[:2]))
    assert good.report.dynamic_smem_bytes == 64_000 and last.report.dynamic_smem_bytes == 32_000
    assert isinstance(bad, build.CompileError)
    assert seen == [(1, 3), (2, 3), (3, 3)]


@needs_nvrtc
def test_a_cache_that_cannot_be_written_costs_a_warning_and_not_the_kernel(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("FASIM_CACHE_DIR", str(blocked))
    with pytest.warns(build.BuildWarning, match="FASIM_CACHE_DIR"):
        assert build.build(SOURCE).cubin


def test_without_a_compiler_what_is_cached_still_loads_and_the_rest_is_one_sentence(monkeypatch, no_compiler):
    cached = build.compiler_version() is not None
    if cached:
        build.build(SOURCE)
    monkeypatch.setattr(build, "_version", [None])
    no_compiler()
    with pytest.raises(build.MissingCompiler, match=r"other\.cu is not in the cache .* pip install 'fasim\[kernels\]'"):
        build.build(replace(SOURCE, name="other.cu"))
    assert (build.lookup(SOURCE) is not None) == cached


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FASIM_CACHE_DIR": "/a"}, "/a/cubin"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/fasim/cubin"),
        ({"HOME": "/h"}, "/h/.cache/fasim/cubin"),
    ],
)
def test_where_the_cache_is(monkeypatch, environment, expected):
    for name in ("FASIM_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(build.cache_dir()) == expected


@needs_nvrtc
def test_a_constant_is_read_from_the_cubin_and_an_unknown_one_is_none():
    cubin = build.build(SOURCE).cubin
    assert build.constant(cubin, build.SMEM_SYMBOL) == 64_000
    assert build.constant(cubin, "attention_smem") is None


@needs_nvrtc
def test_the_first_compilations_of_a_process_may_be_side_by_side(tmp_path):
    """cuda.core, imported by two threads at once, gives one of them half a module."""
    code = (
        "from fasim.kernels.compile import build\n"
        "text = 'extern \"C\" __global__ void attention_forward() {}'\n"
        "made = build.build_all([build.Source('side.cu', text, {}, {'N': i}) for i in range(8)])\n"
        "raise SystemExit(0 if all(isinstance(each, build.Built) for each in made) else 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
