"""fasim inspect: kernels of any kind are read or refused in a sentence, and no text of a disassembler breaks the reader."""

from __future__ import annotations

import random
import subprocess
import tempfile
from functools import cache

import pytest

from fasim.kernels.compile import build, disassemble
from fasim.kernels.compile.inspect import _late, inspect
from fasim.kernels.cuda.config import config_for
from fasim.simulator.code import loop_reader, profiles, sass
from fasim.simulator.errors import UsageError

MMA = """.version 7.8
.target sm_80
.address_size 64
.visible .entry multiplies(.param .u64 out, .param .u32 turns) {
  .reg .b32 %a<4>, %b<2>, %i, %n; .reg .f32 %c<4>; .reg .b64 %p; .reg .pred %again;
  ld.param.u64 %p, [out]; ld.param.u32 %n, [turns]; cvta.to.global.u64 %p, %p; mov.u32 %i, 0;
  ld.global.v4.u32 {%a0, %a1, %a2, %a3}, [%p]; ld.global.v2.u32 {%b0, %b1}, [%p+16]; ld.global.v4.f32 {%c0, %c1, %c2, %c3}, [%p+32];
LOOP:
  mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%c0,%c1,%c2,%c3}, {%a0,%a1,%a2,%a3}, {%b0,%b1}, {%c0,%c1,%c2,%c3};
  ex2.approx.f32 %c0, %c0;
  add.u32 %i, %i, 1; setp.lt.u32 %again, %i, %n;
  @%again bra LOOP;
  st.global.v4.f32 [%p+32], {%c0, %c1, %c2, %c3};
  ret;
}
"""


def has(tool: str) -> bool:
    try:
        return bool(disassemble.tool(tool))
    except disassemble.MissingDisassembler:
        return False


needs_disassembler = pytest.mark.skipif(not has("nvdisasm"), reason="no disassembler: it comes with CUDA and with Triton's wheel")


@needs_disassembler
@pytest.mark.skipif(not has("ptxas"), reason="no ptxas: it comes with CUDA and with Triton's wheel")
def test_ptx_is_compiled_and_a_loop_of_mma_sync_is_read(fasim, tmp_path):
    path = tmp_path / "kernel.ptx"
    path.write_text(MMA)
    status, out, _ = fasim("inspect", str(path))
    assert status == 0 and "GEMMs by mma.sync" in out and "x m16n8k16 by mma.sync" in out
    (found,) = (inspect(code) for code in disassemble.kernels_of(path))
    assert "no loop with exponentials between GEMMs" in found.not_read and found.reads_as == ""
    assert found.registers > 0 and found.turns[0].pipes["mufu"] >= 1 and found.local == 0


@needs_disassembler
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("no.ptx", "hello", "names no .target"),
        ("bad.ptx", MMA.replace("ret;", "nonsense;"), "cannot be read"),
        ("text.cubin", "hello", "holds no machine code"),
        ("empty.so", "", "holds no machine code"),
        ("cut.cubin", "\x7fELF" + "\0" * 14 + "\xbe\0" + "\0" * 100, "cannot be read"),
    ],
)
def test_what_is_no_kernel_is_refused_in_a_sentence(fasim, tmp_path, name, content, said):
    if name == "bad.ptx" and not has("ptxas"):
        pytest.skip("no ptxas")
    path = tmp_path / name
    path.write_bytes(content.encode("latin-1"))
    for command in (("inspect", str(path)), ("predict", "--kernel", str(path))):
        status, out, err = fasim(*command)
        assert (status, out) == (2, "") and said in err and err.count("\n") == 1


def test_exponentials_behind_the_wait_that_was_to_hide_them_are_said():
    (theirs,) = (each for each in profiles.load("fa3-fwd-0.0.3") if (each.head_dim, each.dtype, each.causal) == (128, "bf16", True))
    assert "53 of 66 exponentials a thread stand behind the wait" in _late(theirs.pipeline)[0]
    for ours in profiles.load(profiles.OURS):
        assert _late(ours.pipeline) == []


@cache
def text() -> str:
    """What the disassembler says of one of our kernels."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(build.build(config_for("pingpong", "fp16", 128, False).source).cubin)
        file.flush()
        return subprocess.run([disassemble.tool("nvdisasm"), "-hex", file.name], capture_output=True, text=True, check=True).stdout


@needs_disassembler
@pytest.mark.skipif(build.compiler_version() is None, reason="NVRTC is not installed")
def test_the_usual_way_leaves_out_what_is_skipped_most_of_the_time():
    (found,) = map(inspect, disassemble.of_cubin(build.build(config_for("pingpong", "fp16", 128, False).source).cubin))
    main = next(turn for turn in found.turns if turn.scores)
    assert main.pipes["mufu"] == main.scores == 64  # the standing code has another try, with as many again
    assert main.instructions < main.standing / 2
    assert (found.threads, found.registers) == (384, 168)
    assert found.reads_as.startswith("tile 128x128, d128; P V of the same block as S; turns;") and found.not_read == ""


@needs_disassembler
@pytest.mark.skipif(build.compiler_version() is None, reason="NVRTC is not installed")
@pytest.mark.parametrize("seed", range(24))
def test_no_text_breaks_the_reader(seed):
    """Lines lost, doubled, exchanged and garbled: what is read of them is a loop's order or a sentence, never another error."""
    chance = random.Random(seed)
    lines = text().splitlines()
    for _ in range(chance.choice((1, 10, 300))):
        at, other = chance.randrange(len(lines)), chance.randrange(len(lines))
        what = chance.randrange(5)
        if what == 0:
            del lines[at]
        elif what == 1:
            lines.insert(at, lines[other])
        elif what == 2:
            lines[at], lines[other] = lines[other], lines[at]
        elif what == 3 and lines[at]:
            place = chance.randrange(len(lines[at]))
            lines[at] = lines[at][:place] + chance.choice("0fR,@[]`.; ") + lines[at][place + 1 :]
        else:
            lines[at] = lines[at][: chance.randrange(len(lines[at]) + 1)]
    for code in sass.read("\n".join(lines)):
        inspect(code)
        try:
            found = loop_reader.read(code)
        except UsageError as error:
            assert str(error).count("\n") == 0
        else:
            assert found.blocks and found.instructions > 0
