"""The recorded times of our kernels are of the sources that stand here, and keep what the project promises of them."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

import fasim
from fasim.kernels.compile import build
from fasim.kernels.cuda import config, fastest
from fasim.kernels.cuda.config import KernelConfig, config_for
from fasim.kernels.decode import splits
from fasim.kernels.measure import earlier

ROOT = Path(fasim.__file__).parent
needs_compiler = pytest.mark.skipif(build.compiler_version() is None, reason="NVRTC is not installed")


def read(name: str) -> dict:
    """A record of traces/recorded/kernels."""
    return json.loads((ROOT / "traces" / "recorded" / "kernels" / f"{name}.json").read_text(encoding="utf-8"))


RECORD = read("triton_h200")
CUDA = ("cuda_h200", "cuda_ablation_h200", "cuda_sustained_h200")


def rate(kernel: str, sweep: str, seqlen: int, causal: bool) -> float:
    """TFLOP/s at head_dim 128."""
    (row,) = (
        row
        for row in RECORD["rows"]
        if (row["kernel"], row["pass"], row["seqlen_q"], row["causal"], row["head_dim"]) == (kernel, sweep, seqlen, causal, 128)
    )
    return row["tflops"]


def test_the_record_is_of_todays_triton_kernels():
    recorded = {name: digest for name, digest in RECORD["kernel_sha256"].items() if "/triton/" in name}
    today = {f"kernels/triton/{path.name}": path for path in (ROOT / "kernels" / "triton").glob("*.py")}
    assert recorded == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in today.items()}
    assert "H200" in RECORD["device"] and RECORD["driver"] and RECORD["packages"]["triton"]


def test_every_timed_kernel_was_right():
    assert all(row["relative_error"] < (4e-3 if row["dtype"] == "bf16" else 1e-3) for row in RECORD["rows"] if "tflops" in row)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("seqlen", [4096, 16384])
def test_the_speed_that_is_promised_at_head_dim_128(seqlen, causal):
    ours = rate("fasim-fa2", "forward", seqlen, causal)
    assert ours >= 1.05 * rate("flex", "forward", seqlen, causal)
    assert ours >= 1.5 * rate("fa2-pytorch", "forward", seqlen, causal)
    assert rate("fasim-fa2", "backward", seqlen, causal) >= 1.2 * rate("fa2-pytorch", "backward", seqlen, causal)


def kernels_in(rows: list[dict]) -> set[KernelConfig]:
    """Our CUDA kernels that some rows are of."""
    of_ours = [row | row.get("shape", {}) for row in rows if row.get("kernel", "fasim-").startswith("fasim-")]
    names = [(row.get("schedule") or row["kernel"].removeprefix("fasim-"), row) for row in of_ours]
    return {config_for(name, row.get("dtype", "fp16"), row["head_dim"], row["causal"]) for name, row in names}


@needs_compiler
@pytest.mark.parametrize("name", [*CUDA, "cuda_endurance_h200"])
def test_the_record_is_of_todays_cuda_kernels(name):
    """Of their texts, or of others that compile to the same machine code."""
    record = {f"kernels/cuda/{Path(path).name}": digest for path, digest in read(name)["kernel_sha256"].items()}
    shared = {path for path in record if path.endswith((".cuh", "wgmma.py"))}
    assert len(shared) >= 6
    for kernel in kernels_in(read(name)["rows"]):
        for path in (*shared, kernel.path.relative_to(ROOT).as_posix()):
            assert earlier.stands(path, record[path], kernel), f"{path} has changed since, and {kernel.name} with it"


@pytest.mark.parametrize("name", CUDA)
def test_the_record_is_of_the_tiles_that_our_kernels_take_today(name):
    """But for head_dim 64, timed before its third stage: forward_h200 has those."""
    for row in read(name)["rows"]:
        if row["kernel"].startswith("fasim-"):
            tile = config_for(row["kernel"].removeprefix("fasim-"), row["dtype"], row["head_dim"], row["causal"]).tile
            assert row["tile"] == (replace(tile, stages=2) if row["head_dim"] == 64 else tile).to_dict()


@pytest.mark.parametrize("name", CUDA)
def test_the_record_says_on_what_and_that_the_results_were_right(name):
    record = read(name)
    assert "H200" in record["device"] and record["driver"] and record["nvrtc"]
    assert all(row["relative_error"] < 1e-3 for row in record["rows"] if "tflops" in row)
    assert all(row["sm_clock_mhz"] > 1000 and row["power_w"] > 100 for row in record["rows"] if "tflops" in row)


@pytest.mark.parametrize("name", ["gluon_h200", "gluon_two_compilers_h200", "gluon_queued_h200"])
def test_the_records_of_the_ladder_are_of_todays_gluon_kernels(name):
    """Of their texts; what chooses and launches them may be ahead."""
    launching = {f"kernels/gluon/{name}.py" for name in ("build", "config", "launch")}
    recorded = read(name)["kernel_sha256"]
    assert launching < set(recorded)
    for name in set(recorded) - launching:
        assert hashlib.sha256((ROOT / name).read_bytes()).hexdigest() == recorded[name], f"{name} has changed since"


def test_each_rung_of_the_ladder_gains_on_the_one_below_and_the_last_comes_close_to_flash_attention_3():
    """At head_dim 128, to 1 %; the last two have a record of their own."""
    rates = {}
    for row in read("gluon_h200")["rows"]:
        if "tflops" in row:
            rates.setdefault((row["head_dim"], row["seqlen_q"], row["causal"]), {})[row["kernel"]] = row["tflops"]
    for (head_dim, _, causal), rate in rates.items():
        if head_dim == 128:
            ladder = [rate[f"gluon-{rung}"] for rung in ("tma", "warp-specialized", "pingpong", "overlap-2stage", "fa3")]
            assert all(upper > 0.99 * lower for lower, upper in itertools.pairwise(ladder))
            assert rate["gluon-fa3"] >= (0.74 if causal else 0.91) * rate["peer:fa3"]
    assert len(rates) == 16


def test_the_last_rung_is_ahead_of_flash_attention_3():
    """At head_dim 128 in every row, by weights from the maximum so far, and those of the rung below it nowhere."""
    shares = {}
    for row in read("gluon_queued_h200")["rows"]:
        if "tflops" in row:
            shares.setdefault((row["head_dim"], row["seqlen_q"], row["causal"]), {})[row["kernel"]] = row["vs_fa3"]
    at_128 = [share for (head_dim, _, _), share in shares.items() if head_dim == 128]
    assert len(at_128) == 6
    assert all(0.94 < share["gluon-persistent"] < 1 < share["gluon-bounded"] for share in at_128)
    assert statistics.geometric_mean(share["gluon-bounded"] for share in at_128) > 1.04
    assert all(share["gluon-bounded"] > 0.92 for share in shares.values())


def test_weights_from_the_maximum_so_far_pay_in_triton_and_what_is_chosen_is_what_was_fastest():
    """Of the forms that launch/fa2.py takes, where they were timed: to 3 %."""
    fa2 = pytest.importorskip("fasim.kernels.launch.fa2")
    record = read("triton_forms_h200")
    text = (ROOT / "kernels" / "launch" / "bounded.py").read_bytes()
    assert hashlib.sha256(text).hexdigest() == record["kernel_sha256"]["launch/bounded.py"]
    timed = {}
    for row in record["rows"]:
        if "tflops" in row:
            timed.setdefault((row["head_dim"], row["causal"], row["batch"], row["seqlen_q"]), {})[row["kernel"]] = row
    for (head_dim, causal, batch, seqlen), rows in timed.items():
        shape = (batch, seqlen, 2048 // head_dim, head_dim)
        chosen = rows[fa2.config_for(shape, shape, "bf16", causal).name]
        assert chosen["bounded"] and chosen["relative_error"] < 4e-3
        others = [row["tflops"] for row in rows.values() if "tile" in row]
        assert chosen["tflops"] >= 0.97 * max(others)
        assert chosen["tflops"] > 1.05 * max(row["tflops"] for row in rows.values() if row.get("bounded") is False)
        if head_dim == 128:
            assert chosen["vs_fa3"] >= {1024: 0.75, 4096: 0.78, 16384: 0.845}[seqlen]
    assert record["host_us"]["past Triton's launcher"] <= 25


def test_fa3_is_faster_than_flash_attention_3():
    means = {mean["head_dim"]: mean["vs_fa3"] for mean in read("cuda_h200")["means"] if mean["kernel"] == "fasim-fa3"}
    assert means[128]["rows"] == 12 and means[128]["geometric_mean"] >= 1.05 and means[128]["least"] >= 0.99
    assert min(means[64]["geometric_mean"], means[256]["geometric_mean"]) >= 1.0


def test_repeated_runs_were_bitwise_the_same():
    record = read("cuda_endurance_h200")
    assert len({json.dumps(row["shape"]) for row in record["rows"]}) == 10 and len(record["rows"]) == 50
    assert all(row["runs"] == 200 and row["passed"] and row["differ"] == 0 for row in record["rows"])


def test_the_record_of_few_queries_is_of_todays_kernel_and_parts():
    record = read("decode_h200")
    kernel = ROOT / "kernels" / "decode" / "kernel.py"
    assert hashlib.sha256(kernel.read_bytes()).hexdigest() == record["kernel_sha256"]["kernels/decode/kernel.py"]
    assert "H200" in record["device"] and record["driver"] and record["packages"]["fa3-fwd"]
    for row in record["rows"]:
        rows = row["queries"] * row["heads"] // row["kv_heads"]
        assert row["parts"] == splits.choose(row["head_dim"], rows, row["batch"] * row["kv_heads"], row["keys"], 132).parts
        assert all(each["relative_error"] < 4e-3 for each in row["kernels"].values())


def test_few_queries_are_as_fast_as_is_said():
    """The nine rows of one query, 32 heads on 8, head_dim 128: over the better call of FlashAttention-3, and TB/s where K and V
    are over 256 MB."""
    rows = [row for row in read("decode_h200")["rows"] if (row["queries"], row["heads"], row["head_dim"]) == (1, 32, 128)]
    rows = [row for row in rows if row["keys"] >= 4096]
    ratios = []
    for row in rows:
        time = {name: each["us"] for name, each in row["kernels"].items()}
        ratios.append(min(time["fa3"], time["fa3-kvcache"]) / time["fasim"])
        assert time["fasim"] < time["fasim-fa3"] / 2
        if row["batch"] * row["keys"] * 8 * 128 * 4 > 256e6:
            assert row["kernels"]["fasim"]["tb_per_s"] >= 4.3
    assert len(rows) == 9 and min(ratios) >= 1.0 and math.prod(ratios) ** (1 / 9) >= 1.1
    assert next(row["kernels"]["fasim"]["us"] for row in rows if (row["batch"], row["keys"]) == (1, 4096)) < 13


def test_a_call_costs_the_host_less_than_three_bare_launches_beyond_its_own():
    record = read("host_overhead_h200")  # in launches, since a launch takes 4.4 us on one H200's host and 7.5 us on another's
    spent, launch = record["beyond_the_launch_us"], record["host_us"]["launch alone"]
    assert all(us < 3 * launch for way, us in spent.items() if way.startswith("flash_attn_func"))


FORWARD = read("forward_h200")
"""Every kernel of ours beside the peers, in one process."""


def name_of(row: dict) -> str:
    return f"d{row['head_dim']}-{row['seqlen']}-{'causal' if row['causal'] else 'full'}"


@pytest.mark.parametrize("row", FORWARD["rows"], ids=name_of)
def test_auto_takes_a_kernel_within_a_percent_of_the_fastest_and_ahead_of_the_peers(row):
    us, peers = row["us"], ("peer:fa3", "peer:fa4", "peer:cudnn")
    ours = {name: each for name, each in us.items() if name not in (*peers, "auto")}
    chosen = us[fastest.by_shape(row["head_dim"], row["causal"], row["seqlen"])]
    assert chosen <= 1.01 * min(ours.values()) and len(ours) >= 5
    assert all(chosen < us[peer] / 1.02 for peer in peers)
    assert max(row["relative_error"].values()) < 4e-3 and not row["refused"]


@pytest.mark.parametrize(("head_dim", "least"), [(64, 1.1), (128, 1.07), (256, 1.045)])
def test_the_forward_is_so_much_faster_than_the_best_peer(head_dim, least):
    """As geometric mean over 512 to 16k, full and causal."""
    rows = [row for row in FORWARD["rows"] if row["head_dim"] == head_dim]
    best = [min(us for name, us in row["us"].items() if name.startswith("peer:")) for row in rows]
    taken = [row["us"][fastest.by_shape(head_dim, row["causal"], row["seqlen"])] for row in rows]
    assert len(rows) == 12 and math.prod(map(float.__truediv__, best, taken)) ** (1 / 12) >= least


TIMED = {"forward_h200": config.SCHEDULES, "pairs_h200": ("overlap-2stage",), "varlen_h200": ("fa3",)}
"""Record -> whose .cu it is of; of the first two, `kernels/cuda/pairs` has the same texts."""


@pytest.mark.parametrize("name", TIMED)
def test_schedules_and_packed_sequences_were_timed_as_they_stand(name):
    record = read(name)
    assert "H200" in record["device"] and record.get("driver", record["cuda"])
    texts = {config.path_of(schedule).relative_to(ROOT).as_posix() for schedule in TIMED[name]}
    of_theirs = {path: digest for path, digest in record["kernel_sha256"].items() if path.endswith(".cuh") or path in texts}
    assert of_theirs == {path: earlier.sha256(path) for path in of_theirs} and texts < of_theirs.keys()


def test_packed_sequences_keep_the_rate_of_fixed_lengths_and_no_batch_is_behind_flash_attention_3():
    rows = {row["name"]: row for row in read("varlen_h200")["rows"]}
    for mask in ("causal", "full"):
        row = rows[f"64 of 16 to 8000, {mask}"]
        assert row["kernels"]["fasim"]["tflops"] > 0.95 * row["fixed"]["tflops"]
    for row in rows.values():
        ours, theirs = row["kernels"]["fasim"], row["kernels"]["fa3"]
        assert ours["us"] < theirs["us"] and ours["relative_error"] < 4e-3


def test_a_cache_in_pages_costs_little_and_is_not_behind_flash_attention_3_without_them():
    rows = read("pages_h200")["rows"]
    assert len(rows) == 6
    for row in rows:
        ours, theirs = row["kernels"], row["kernels"]["fa3 lengths"]["us"]
        of_64_and_more = [each["us"] for name, each in ours.items() if name in ("pages of 64", "pages of 128", "pages of 256")]
        assert len(of_64_and_more) == 3 and max(of_64_and_more) < min(theirs, 1.06 * ours["decode"]["us"])
        assert ours["pages of 16"]["us"] < 1.17 * ours["decode"]["us"]
