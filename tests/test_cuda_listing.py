"""`fasim kernels`: what is listed, what is compiled, and how it fails."""

from __future__ import annotations

import json

import pytest

from fasim.kernels.compile import build
from fasim.kernels.cuda import catalog
from fasim.kernels.cuda.config import available, config_for
from fasim.kernels.cuda.pairs import config as pairs

needs_nvrtc = pytest.mark.skipif(build.compiler_version() is None, reason="NVRTC is not installed")
KEYS = (
    "schedule dtype head_dim causal tile threads registers spill_bytes smem_bytes cubin_bytes compiler remarks cached error"
).split()


@pytest.fixture(autouse=True)
def two_kernels(monkeypatch, tmp_path):
    """A cache of the test's own, and two kernels in the list."""
    if not available():
        pytest.skip("no CUDA kernel yet")
    monkeypatch.setenv("FASIM_CACHE_DIR", str(tmp_path))
    pair = [config_for(available()[0], "fp16", head_dim, False) for head_dim in (64, 128)]
    monkeypatch.setattr(catalog, "variants", lambda: pair)
    monkeypatch.setattr(catalog.pairs, "variants", list)
    return pair


def test_kernels_whose_ctas_share_an_sm_are_listed_by_the_name_that_is_asked_for(fasim, monkeypatch):
    one = pairs.config_for(pairs.NAMES[0], "bf16", 64, True)
    monkeypatch.setattr(catalog.pairs, "variants", lambda: [one])
    *_, row = json.loads(fasim("kernels", "--json")[1])
    assert (row["schedule"], row["tile"]["resident"]) == ("pairs-overlap-2stage", 3) and row["schedule"] in fasim("kernels")[1]


@needs_nvrtc
def test_kernels_lists_compiles_and_then_finds_everything_cached(fasim, two_kernels):
    status, out, _ = fasim("kernels", "--json")
    rows = json.loads(out)
    assert status == 0 and [list(row) for row in rows] == [KEYS, KEYS]
    assert [(row["head_dim"], row["registers"], row["cached"]) for row in rows] == [(64, None, False), (128, None, False)]
    status, out, _ = fasim("kernels", "--compile")
    assert status == 0 and out.count(" now") == 2
    status, out, _ = fasim("kernels", "--json")
    assert all(row["cached"] and row["registers"] > 0 and row["cubin_bytes"] > 0 for row in json.loads(out))
    status, out, _ = fasim("kernels")
    assert out.count(" yes") == 2 and all(str(config.tile) in out for config in two_kernels)


def test_without_nvrtc_compiling_is_refused_in_one_sentence(fasim, monkeypatch):
    monkeypatch.setattr(build, "_version", [None])
    status, out, err = fasim("kernels", "--compile")
    assert (status, out) == (3, "")
    assert err.count("\n") == 1 and "needs NVRTC, which is not installed: pip install" in err
    status, out, _ = fasim("kernels")
    assert status == 0 and out.count(" no") == 2


@needs_nvrtc
def test_a_kernel_that_does_not_compile_is_shown_with_its_error_and_fails_the_command(fasim, monkeypatch):
    real = build._compile

    def broken(source):
        if source.defines["HEAD_DIM"] == 128:
            raise build.CompileError("fa3.cu does not compile:\n  fa3.cu(1): error: nothing")
        return real(source)

    monkeypatch.setattr(build, "_compile", broken)
    status, out, _ = fasim("kernels", "--compile")
    assert status == 1
    assert "broken" in out and "fa3.cu(1): error: nothing" in out and out.count(" now") == 1
