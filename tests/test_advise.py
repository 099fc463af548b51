"""Advice for a model from its configuration: closed forms are exact, the kernel named is the fastest predicted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fasim.simulator.devices.device import load_device
from fasim.simulator.errors import UsageError
from fasim.simulator.predict import predict
from fasim.simulator.problem.workload import Workload
from fasim.simulator.results import metrics
from fasim.simulator.schedules import BACKWARD
from fasim.traces.answers import advise as room
from fasim.traces.answers.advise import KERNELS, UNSHIPPED, Model, advise, read_config

MODELS = Path(__file__).parent / "data" / "models"
"""Written from the published numbers of three models."""
PUBLISHED = {
    "llama_3_1_8b": (32, 32, 8, 128),
    "gpt2": (12, 12, 12, 64),
    "gemma_2_9b": (42, 16, 8, 256),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_configuration_gives_layers_heads_and_head_dim(name):
    model = read_config(MODELS / f"{name}.json")
    assert (model.layers, model.heads, model.kv_heads, model.head_dim) == PUBLISHED[name]
    assert any("window" in note for note in model.notes) == (name == "gemma_2_9b")


@pytest.mark.parametrize("name", PUBLISHED)
def test_flops_and_least_bytes_are_exact(monkeypatch, name):
    """4 d for every pair that the causal mask leaves (10 of the backward); Q, K, V once in, O or the gradients once out."""
    monkeypatch.setattr(room, "_names", lambda work, gpu, real=room._names: real(work, gpu)[:1])  # whichever kernel it is
    layers, heads, kv_heads, d = PUBLISHED[name]
    found = advise(read_config(MODELS / f"{name}.json"), [256], batch=2, workers=1)
    assert [(each.run.workload.direction, each.run.workload.dtype) for each in found.layers] == [
        ("forward", "bf16"), ("forward", "e4m3"), ("backward", "bf16")
    ]  # fmt: skip
    pairs, tokens = 256 * 257 // 2, 2 * 256
    for each in found.layers:
        row, back = each.to_dict(), each.run.workload.backward
        assert row["step"]["flops"] == layers * 2 * heads * pairs * d * (10 if back else 4)
        size = 1 if row["dtype"] == "e4m3" else 2
        read = tokens * d * ((2 * heads if back else heads) + 2 * kv_heads) * size
        written = tokens * d * ((heads + 2 * kv_heads) if back else heads) * 2
        assert row["layer"]["compulsory_bytes"] == read + written
        assert row["layer"]["hbm_bytes"] >= 0.99 * row["layer"]["compulsory_bytes"]
        assert row["step"]["time_s"] == layers * row["layer"]["time_s"]
        per_token = row["step"]["energy_j"] / tokens * 1e6
        assert row["step"]["joules_per_million_tokens"] == pytest.approx(per_token)
        assert row["step"]["kwh_per_million_tokens"] == pytest.approx(per_token / 3.6e6)


def test_the_kernel_named_is_the_fastest():
    found = advise(read_config(MODELS / "llama_3_1_8b.json"), [256], directions=("forward",), dtypes=("bf16",), workers=1)
    (layer,) = found.layers
    assert {layer.run.schedule, *(each.schedule for each in layer.others)} == set(KERNELS)
    times = {name: metrics.time_s(predict(layer.run.workload, name, "h200")) for name in KERNELS}
    assert times[layer.run.schedule] == min(times.values()) == metrics.time_s(layer.run)
    assert found.sentence.startswith(f"Use {layer.run.schedule} (") and "of all layers cost" in found.sentence


def test_no_backward_is_named_that_has_no_kernel():
    cuda = pytest.importorskip("fasim.kernels.cuda.backward.config").SCHEDULES
    assert UNSHIPPED < set(BACKWARD) and not UNSHIPPED & set(cuda)
    for head_dim in (64, 128, 256):
        work = Workload(1, 16, 2048, head_dim, "bf16", True, direction="backward")
        found = set(room._names(work, load_device("h200")))
        assert found and not found & UNSHIPPED


def test_a_head_dim_between_two_is_predicted_as_kernels_pad_and_counted_as_it_is():
    found = advise(Model("m", 2, 2, 2, 96), [256], directions=("forward",), dtypes=("bf16",), workers=1)
    assert "head dim 96 is predicted as 128" in found.notes[0]
    assert found.layers[0].to_dict()["layer"]["flops"] == 2 * 4 * 96 * 256 * 257 // 2


def test_on_a_gpu_without_fp8_there_is_no_fp8():
    found = advise(Model("m", 1, 1, 1, 64), [256], device="a100-sxm", workers=1)
    assert {each.run.workload.dtype for each in found.layers} == {"bf16"} and found.layers[0].run.schedule.startswith("fa2")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ([], "is no table"),
        ({}, "has no num_hidden_layers (nor n_layer"),
        ({"n_layer": 2}, "has no num_attention_heads"),
        ({"n_layer": 2, "n_head": 3}, "has no hidden_size"),
        ({"n_layer": 2, "n_head": 3, "n_embd": 64}, "no multiple of 3 heads"),
        ({"n_layer": 2, "n_head": 0, "head_dim": 64}, "expected a whole number from 1"),
        ({"n_layer": "two", "n_head": 1, "head_dim": 64}, "n_layer is 'two'"),
        ({"n_layer": 2, "n_head": 3, "num_key_value_heads": 2, "head_dim": 64}, "do not divide 3 heads"),
        ({"n_layer": 2, "n_head": 1, "head_dim": 512}, "more than any schedule here takes"),
        ({"n_layer": 2, "n_head": 1, "head_dim": 64, "kv_lora_rank": 512}, "multi-head latent attention"),
    ],
)
def test_a_configuration_that_says_too_little_is_a_sentence(tmp_path, config, says):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(UsageError, match="^[^\n]+$") as found:
        read_config(path)
    assert says in str(found.value)


def test_layers_of_other_kinds_and_models_within_models(tmp_path):
    path = tmp_path / "config.json"
    inner = {"num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": True, "head_dim": 64}
    kinds = {"layer_types": ["full_attention", "sliding_attention"]}
    path.write_text(json.dumps({"model_type": "vlm", "text_config": inner | kinds}))
    model = read_config(path)
    assert (model.name, model.kv_heads) == ("vlm", 1) and "1 of 2 layers are not of full attention" in model.notes[0]


def test_the_command(fasim):
    model = ("advise", "--model-config", str(MODELS / "gpt2.json"))
    asked = (*model, "--seqlen", "128,256", "--workers", "1")
    status, out, _ = fasim(*asked)
    assert status == 0 and out.startswith("Use ") and "J/Mtoken" in out and "behind" in out
    found = json.loads(fasim(*asked, "--json")[1])
    assert [row["workload"]["seqlen_q"] for row in found["rows"]] == [128, 128, 128, 256, 256, 256]
    faults = {("--seqlen", "x"): "not a whole number", ("--workers", "0"): "1 or more", ("--device", "b200"): "h200"}
    for wrong, says in faults.items():
        status, out, err = fasim(*model, *wrong)
        assert (status, out) == (2, "") and says in err
    assert "does not exist" in fasim("advise", "nowhere.json")[2]
