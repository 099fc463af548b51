"""The suite rejects every planted fault by name, accepts what is right, and says how to repeat what it found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

torch = pytest.importorskip("torch")

from fasim.kernels.cuda import config as cuda  # noqa: E402
from fasim.kernels.gluon import config as gluon  # noqa: E402
from fasim.kernels.validation import bench as bench_room  # noqa: E402
from fasim.kernels.validation import criteria, isolation, kinds, mutants, sanitize, state, subjects, suite  # noqa: E402
from fasim.kernels.validation import guards as guards_room  # noqa: E402
from fasim.kernels.validation.check import Case, Check, Fault, MissingTool, Noted, Trial  # noqa: E402
from fasim.kernels.validation.report import Report, junit  # noqa: E402
from fasim.simulator.errors import UsageError  # noqa: E402

USER = """
import torch

def right(q, k, v, causal=False, softmax_scale=None):
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    s = torch.einsum("bmhd,bnhd->bhmn", q.float(), k.float()) * scale
    if causal:
        s = s.masked_fill(~torch.ones(s.shape[-2:]).tril(s.shape[-1] - s.shape[-2]).bool(), float("-inf"))
    p = torch.softmax(s, -1)
    if causal and q.shape[1] > k.shape[1]:
        p = p.nan_to_num(0.0)
    return torch.einsum("bhmn,bnhd->bmhd", p, v.float()).to(q.dtype)

def drops_the_tail(q, k, v, causal=False, softmax_scale=None):
    kept = k.shape[1] // 64 * 64 or k.shape[1]
    return right(q, k[:, :kept], v[:, :kept], False, softmax_scale) if not causal else right(q, k, v, True, softmax_scale)

def supports_nothing(q, k, v, causal=False, softmax_scale=None):
    raise NotImplementedError("head_dim")

def crashes(q, k, v, causal=False, softmax_scale=None):
    raise RuntimeError("no kernel image")

def two_arguments(q, k):
    return q
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A working directory with the user's module `my_attention`."""
    (tmp_path / "my_attention.py").write_text(USER, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("my_attention", None)


def small_bench(kernel=None, **options) -> bench_room.Bench:
    subject = mutants.subject("tiled", kernel or mutants.TiledAttention())
    return bench_room.Bench(subject, torch.device("cpu"), torch.float16, quick=True, group="test", **options)


# -- what is right ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp64"])
def test_a_correct_kernel_passes_in_every_dtype(dtype):
    subject = mutants.subject("tiled", mutants.TiledAttention())
    report = suite.validate(subject, device="cpu", dtype=dtype, seed=1, quick=True, only=["accuracy", "inputs", "gradients"])
    assert report.passed, [check.message for check in report.failures]


def test_pytorchs_math_attention_passes():
    report = suite.validate(subjects.resolve("torch-math"), device="cpu", seed=2, quick=True, only=["shapes", "memory"])
    assert report.passed, [check.message for check in report.failures]


def test_the_same_seed_gives_the_same_inputs_and_another_gives_others():
    case = Case(name="a", seqlen_q=4, seqlen_k=4, head_dim=8)
    first, again, other = (small_bench(seed=seed).tensors(case)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_subject_that_supports_nothing_does_not_pass():
    def refuse(*_, **__):
        raise NotImplementedError

    report = suite.validate(subjects.Subject(name="none", forward=refuse), device="cpu", quick=True, only=["inputs"])
    assert not report.passed and "not validated" in report.conclusion


# -- criteria ---------------------------------------------------------------------------------------------------------


def hold(got: list[float], expected: list[float], bound: criteria.Bound) -> dict:
    shape = (1, len(got), 1, 1)
    return criteria.hold("O", "bmhd", torch.tensor(got).reshape(shape), torch.tensor(expected).double().reshape(shape), bound)


def test_the_bound_is_twice_the_baselines_error_plus_rounding():
    expected = torch.tensor([1.0, 0.5], dtype=torch.float64)
    bound = criteria.Bound.of(torch.tensor([1.01, 0.5], dtype=torch.float16), expected, torch.zeros(1), 1)
    error = abs(float(torch.tensor(1.01, dtype=torch.float16)) - 1.0)
    assert bound.largest == pytest.approx(2 * error + 2**-10, rel=1e-3)
    assert bound.mean == pytest.approx(error + 0.75 * 2**-12, rel=1e-3)


def test_a_fault_names_the_element_what_it_is_and_what_it_should_be():
    with pytest.raises(Fault, match=r"O\[batch 0, row 1, head 0, column 0\] is 3, expected 2: error 1, allowed 0.5"):
        hold([1.0, 3.0], [1.0, 2.0], criteria.Bound(0.5, 9.0))
    with pytest.raises(Fault, match=r"row 1, .* is nan"):
        hold([1.0, float("nan")], [1.0, 2.0], criteria.Bound(9.0, 9.0))
    with pytest.raises(Fault, match="drifts"):
        hold([1.1, 2.1], [1.0, 2.0], criteria.Bound(0.5, 0.01))
    assert hold([1.0], [1.0], criteria.Bound(0.1, 0.1))["max_error"] == 0.0


@pytest.mark.parametrize(
    ("got", "expected", "passes"),
    [
        (1.0 + 0.9e-5, 1.0, True),
        (1.0 + 1.1e-5, 1.0, False),
        (100.0 + 0.9e-3, 100.0, True),
        (100.0 + 1.1e-3, 100.0, False),
        (float("-inf"), float("-inf"), True),
        (float("inf"), float("-inf"), False),
        (float("nan"), 1.0, False),
        (0.0, float("-inf"), False),
    ],
)
def test_lse_is_held_to_1e_5_and_minus_infinity(got, expected, passes):
    values = (torch.tensor(x, dtype=torch.float64).reshape(1, 1, 1) for x in (got, expected))
    if passes:
        criteria.hold_lse(*values)
    else:
        with pytest.raises(Fault, match="LSE"):
            criteria.hold_lse(*values)


# -- inputs -----------------------------------------------------------------------------------------------------------


def test_the_kinds_of_inputs_are_what_they_say():
    case = Case(name="x", seqlen_q=64, seqlen_k=64, head_dim=64)
    made = {kind: make(case, torch.Generator().manual_seed(0)) for kind, make in kinds.KINDS.items()}
    scores = {kind: torch.einsum("bmhd,bnhd->bhmn", q, k) for kind, (q, k, _) in made.items()}
    assert scores["large logits"].abs().amax() / 8 > 89  # exp overflows fp32
    assert scores["scores beyond fp16"].abs().amin() > 65504
    assert made["outliers"][0].abs().amax() > 8
    assert (torch.softmax(scores["sink at the last key"] / 8, -1)[..., -1] > 0.5).float().mean() > 0.8
    assert (torch.softmax(scores["one-hot"] / 8, -1).amax(-1) > 0.9).float().mean() > 0.9
    rising = scores["rising logits"].amax(-2)
    assert (rising.unflatten(-1, (4, 16)).amax(-1).diff() > 0).all()
    assert (made["constant V"][2].diff(dim=1) == 0).all() and (made["equal keys"][1].diff(dim=1) == 0).all()


# -- memory -----------------------------------------------------------------------------------------------------------


def test_guards_find_one_element_on_either_side():
    for offset, side in ((-1, "before"), (6, "past")):
        guards = guards_room.Guards()
        x = guards.around("q", torch.zeros(2, 3))
        assert guards.hold() == 1
        x.as_strided((1,), (1,), x.storage_offset() + offset).fill_(7.0)
        with pytest.raises(Fault, match=f"1 elements {side} the .* of q, the nearest 1 elements away is now 7"):
            guards.hold()


def test_poison_reaches_allocations_inside_a_custom_op():
    name = "fasim_test::leaves_unwritten"

    @torch.library.custom_op(name, mutates_args=())
    def op(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(x.shape)
        out[0] = x[0]
        return out

    guards = guards_room.Guards()
    with guards_room.poisoned(guards):
        out = op(torch.ones(3))
    assert out[0] == 1.0 and out[1:].isnan().all()
    assert guards.hold() == 1
    assert not torch.are_deterministic_algorithms_enabled()


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("user")
def test_a_users_planted_fault_is_rejected_with_the_input_and_the_seed(fasim):
    tokens = ("my_attention:drops_the_tail", "--device", "cpu", "--quick", "--seed", "7", "--only", "shapes")
    status, out, _ = fasim("validate", *tokens)
    words = " ".join(out.split())
    assert status == 1
    assert "129 (tile + 1), full" in words and "q (1, 129, 2, 64)" in words
    assert "without the last, partial tile (keys from 128)" in words
    assert "expected" in words and "allowed" in words
    command = "fasim validate my_attention:drops_the_tail --device cpu --dtype fp16 --quick --seed 7 --only shapes"
    assert command in words
    assert words.rstrip().endswith("fp16 on CPU, seed 7")
    status, again, _ = fasim(*command.split()[1:])
    assert (status, again) == (1, out)


def test_a_users_correct_callable_passes_with_json_and_junit(fasim, user):
    tokens = ("--kernel", "my_attention:right", "--device", "cpu", "--quick", "--only", "inputs", "--only", "determinism")
    status, out, err = fasim("validate", *tokens, "--json", "--junit", "result.xml")
    [report] = json.loads(out)
    assert status == 0, report["conclusion"]
    assert "result.xml" in err
    assert list(report) == (
        "schema subject device dtype seed quick verdict conclusion seconds environment groups checks rmse".split()
    )
    assert report["schema"] == "fasim.validation/1" and report["verdict"] == "pass"
    assert [group["name"] for group in report["groups"]] == ["inputs", "determinism"]
    assert all(list(c)[:6] == ["group", "case", "verdict", "seed", "message", "figures"] for c in report["checks"])
    suites = ElementTree.parse(user / "result.xml").getroot()
    assert sum(int(each.get("tests")) for each in suites) == len(report["checks"])
    assert all(each.get("failures") == "0" for each in suites)


def test_junit_holds_failures_and_skips():
    checks = [Check("shapes", "a <b>", "fail", 3, "O is wrong"), Check("shapes", "c", "skip", 3, "needs a GPU")]
    root = ElementTree.fromstring(junit([Report("mine:f", "CPU", "fp16", 3, False, checks)]).encode())
    failed, skipped = root[0]
    assert failed.get("name") == "a <b>" and "--seed 3 --only shapes" in failed[0].text
    assert skipped[0].tag == "skipped" and (root[0].get("failures"), root[0].get("skipped")) == ("1", "1")


def test_a_note_is_shown_everywhere_and_decides_nothing(fasim, user, monkeypatch):
    def say(text):
        raise Noted(text, {"max_error": 0.25})

    trials = [Trial("good", dict), Trial("odd", lambda: say("O is a view of q"))]
    monkeypatch.setattr(suite, "GROUPS", {"inputs": ("words", lambda bench: trials), "shapes": ("", lambda bench: trials[1:])})
    report = suite.validate(subjects.resolve("my_attention:right"), device="cpu")
    assert report.passed and [check.verdict for check in report.checks] == ["pass", "note", "note"]
    assert "passes 1 checks in 1 groups, 2 to know" in report.conclusion
    assert report.to_dict()["groups"][0] == {"name": "inputs", "pass": 1, "fail": 0, "skip": 0, "note": 1}
    assert report.to_dict()["checks"][1]["figures"] == {"max_error": 0.25}
    assert ElementTree.fromstring(junit([report]).encode())[0][1][0].text == "O is a view of q"
    monkeypatch.setattr(isolation, "validate_apart", lambda name, **_: report)
    status, out, _ = fasim("validate", "my_attention:right", "--device", "cpu")
    assert status == 0 and "O is a view of q" in out
    report.checks.pop(0)
    assert not report.passed, "notes alone are no pass"


@pytest.mark.usefixtures("user")
def test_a_callable_that_raises_fails_and_one_that_refuses_does_not_pass(fasim):
    for name, words in (("crashes", "raised RuntimeError: no kernel image"), ("supports_nothing", "is not validated")):
        status, out, _ = fasim("validate", f"my_attention:{name}", "--device", "cpu", "--quick", "--only", "determinism")
        assert status == 1 and words in " ".join(out.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize("tokens", [("torch-fa2",), ("torch-fa2", "--json"), ("torch-cudnn", "--device", "cpu"), ()])
def test_without_a_gpu_the_exit_status_is_3_and_stdout_is_empty(fasim, tokens):
    status, out, err = fasim("validate", *tokens)
    assert (status, out) == (3, "")
    assert err.startswith("fasim: ") and "GPU" in err


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (("fa9",), "no kernel is called 'fa9'"),
        (("no_such_module:f",), "cannot import"),
        (("my_attention:missing",), "no callable"),
        (("my_attention:two_arguments",), "does not take the arguments"),
        (("my_attention:right", "--device", "tpu"), "--device"),
        (("my_attention:right", "--device", "cpu", "--dtype", "fp8"), "--dtype"),
        (("my_attention:right", "--device", "cpu", "--only", "taste"), "--only"),
        (("my_attention:right", "--seed", "x"), "x"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(fasim, tokens, words):
    status, out, err = fasim("validate", *tokens)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and err.startswith("fasim: ") and words in err


def test_help_of_validate_imports_no_torch(tmp_path):
    code = "from fasim.cli.main import run; run(['validate', '--help'])\nimport sys\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=tmp_path).returncode == 0


@pytest.mark.usefixtures("user")
def test_a_subject_that_is_not_compiled_is_validated_without_importing_torch_compile():
    """Memory and process ask for deterministic algorithms, for which PyTorch's own switch would import torch.compile."""
    code = (
        "import sys\n"
        "from fasim.kernels.validation import subjects, suite\n"
        "report = suite.validate(subjects.resolve('my_attention:right'), device='cpu', quick=True, only=['memory', 'process'])\n"
        "assert report.passed, report.conclusion\n"
        "print([name for name in ('torch._dynamo', 'torch._inductor') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_torch_compile_is_told_of_determinism_where_it_is_loaded(monkeypatch):
    told = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on, warn_only: told.append((on, warn_only)))
    monkeypatch.delitem(sys.modules, "torch._inductor.config", raising=False)
    for mode in (1, 2, 0):
        state.set_determinism(mode)
        assert torch.get_deterministic_debug_mode() == mode and not told
    monkeypatch.setitem(sys.modules, "torch._inductor.config", torch)
    for mode in (1, 2, 0):
        state.set_determinism(mode)
    assert told == [(True, True), (True, False), (False, False)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_the_training_example_says_that_it_needs_a_gpu():
    example = Path(suite.__file__).parents[2] / "examples" / "train_tiny.py"
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "") and "needs a CUDA GPU" in done.stderr


# -- compute-sanitizer ------------------------------------------------------------------------------------------------

CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
HIT = (
    "========= COMPUTE-SANITIZER\n========= Invalid __global__ write of size 2 bytes\n=========     at kernel+0x90\n"
    "========= ERROR SUMMARY: 3 errors\n"
)
RACE = (
    "========= COMPUTE-SANITIZER\n========= Error: Race reported between Write access at kernel+0x90\n"
    "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
)


def test_the_sanitizers_words_are_understood():
    assert sanitize.read("memcheck", CLEAN, 0) == {"errors": 0}
    with pytest.raises(Fault, match="3 errors; the first: Invalid __global__ write of size 2 bytes"):
        sanitize.read("memcheck", HIT, 86)
    with pytest.raises(Fault, match="1 errors; the first: Error: Race reported"):
        sanitize.read("racecheck", RACE, 86)
    again = RACE.replace("0x90", "0xa0") + "=========     and Read access at kernel+0xb0 [16 hazards]\n"
    with pytest.raises(Fault, match=r"(?s)first: .*0x90\n.*kernel\+0x90\n.*kernel\+0xa0$"):
        sanitize.read("racecheck", RACE + again + RACE, 86)  # every hazard once, and no line that belongs to none
    assert sanitize.complaints(HIT) == [["Invalid __global__ write of size 2 bytes", "at kernel+0x90"]]
    for text in ("========= Error: Device not supported\n", ""):
        with pytest.raises(MissingTool, match="could not run here"):
            sanitize.read("memcheck", text, 1)


def test_sanitize_without_the_tool_says_so(monkeypatch):
    monkeypatch.setattr(sanitize, "find", lambda: None)
    with pytest.raises(MissingTool, match="compute-sanitizer"):
        suite.validate(mutants.subject("tiled", mutants.TiledAttention()), device="cpu", quick=True, with_sanitizer=True)


def test_only_names_that_exist_resolve():
    ours = {"standard", "fa1", "fa2", "pairs-overlap-2stage", *cuda.SCHEDULES, *gluon.NAMES}
    assert set(subjects.names()) == ours | set(subjects.GRADIENTS) | {"torch-cudnn", "torch-fa2", "torch-math"}
    with pytest.raises(UsageError, match="torch-math"):
        subjects.resolve("flash")


def test_the_package_validates_by_name_and_needs_a_gpu_for_a_cuda_kernel():
    import fasim

    with pytest.raises(UsageError, match="no kernel is called"):
        fasim.validate("flash", device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(MissingTool):
            fasim.validate("torch-cudnn")
