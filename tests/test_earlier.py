"""A kernel's earlier text is told from today's by its machine code, not by its words."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from fasim.kernels.compile import build
from fasim.kernels.cuda.config import config_for
from fasim.kernels.measure import earlier

pytestmark = pytest.mark.skipif(build.compiler_version() is None, reason="NVRTC is not installed")
PATH = "kernels/cuda/overlap_3stage.cu"


def then(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_what_came_for_one_head_dim_leaves_the_recordings_of_the_others_standing():
    before = then(earlier.text_of(PATH))
    assert before.startswith("e24cee00b7283147")  # as the recorded runs of before have it
    assert earlier.stands(PATH, before, config_for("overlap-3stage", "fp16", 128, causal=False))
    assert not earlier.stands(PATH, before, config_for("overlap-3stage", "fp16", 256, causal=False))


def test_a_text_that_is_neither_todays_nor_the_one_before_does_not_stand():
    config = config_for("overlap-3stage", "fp16", 128, causal=False)
    assert earlier.stands(PATH, earlier.sha256(PATH), config)
    assert not earlier.stands(PATH, then("another"), config)
    assert not earlier.stands("kernels/cuda/fa3.cu", then("another"), config) and not earlier.stands("gone.cu", then(""), config)
    assert not earlier.stands(PATH, then(earlier.text_of(PATH)), replace(config, schedule="fa3"))  # whose text it is not


def test_machine_code_is_the_instructions_and_nothing_of_the_file_around_them():
    """Another name for a constant changes the file, another constant the code."""
    source = build.Source("small.cu", "constexpr int A = 3;\nextern \"C\" __global__ void attention_forward(int* p) { *p = A; }\n")
    renamed = replace(source, text=source.text.replace("A", "longer"))
    other = replace(source, text=source.text.replace("3", "4"))
    built = [build.build(each).cubin for each in (source, renamed, other)]
    code = [build.machine_code(each) for each in built]
    assert code[0] == code[1] != code[2] and list(code[0]) == [".text.attention_forward"]


def test_a_line_that_is_no_longer_there_is_said(monkeypatch):
    monkeypatch.setitem(earlier.CAME, PATH, ("no such line\n",))
    with pytest.raises(ValueError, match="0 places for 'no such line'"):
        earlier.text_of(PATH)
