"""Advise: which attention kernel a model should use, and what its attention takes a layer and a step, from its configuration.

Configurations are those of Hugging Face (config.json). FLOPs and the bytes that any kernel has to move are closed forms of the
workload; times, HBM bytes and energy are predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...simulator.devices.device import Device, load_device
from ...simulator.errors import UsageError
from ...simulator.problem.tile import HEAD_DIMS
from ...simulator.problem.workload import Workload
from ...simulator.reading import read_json
from ...simulator.results import metrics
from ...simulator.results.run import Run
from ...simulator.schedules import BACKWARD, find_schedule
from ...simulator.units import scaled
from ...simulator.values import Within, number, printable, shown
from ..predictions import Advance, Question, processes, stream
from .verdict import CLOSE

KERNELS = {
    "fa3": "our CUDA kernel",
    "fa2": "our Triton kernel",
    "fa3-published": "FlashAttention-3's library",
    "fa2-pytorch": "FlashAttention-2 in PyTorch",
}
"""Forward schedules that somebody ships a kernel of, and whose it is."""
UNSHIPPED = frozenset({"standard", "warp-specialized", "drained", "keys-first", "registers", "ahead", "covered", "halves"})
"""Backward schedules that nobody ships a kernel of: steps of the ladder, and ours that were measured and given up."""
DTYPES = ("bf16", "e4m3")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
_HEAD_DIM = ("head_dim", "attention_head_size", "kv_channels")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_MLA = ("kv_lora_rank", "qk_rope_head_dim")


@dataclass(frozen=True)
class Model:
    """What attention depends on of a model."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        heads = f"{self.heads} heads" + (f" on {self.kv_heads}" if self.kv_heads != self.heads else "")
        return f"{self.name}: {self.layers} layers, {heads}, d{self.head_dim}"


@dataclass(frozen=True)
class Layer:
    """One pass of one layer's attention by the kernel that is fastest there, among those that were asked about."""

    run: Run
    others: tuple[Run, ...]
    layers: int

    @property
    def step_time_s(self) -> float:
        """Of all layers, in seconds."""
        return metrics.time_s(self.run) * self.layers

    @property
    def step_kwh_per_million_tokens(self) -> float:
        """Of all layers, the board's power."""
        return metrics.kwh_per_million_tokens(self.run) * self.layers

    def to_dict(self) -> dict:
        """As plain JSON values: of a layer, and of a step of all layers."""
        run, work = self.run, self.run.workload
        moved = run.traffic.total("hbm_read") + run.traffic.total("hbm_write")
        least = work.compulsory_read_bytes + work.compulsory_write_bytes
        energy = metrics.energy_j(run)
        return {
            "pass": work.direction, "dtype": work.dtype, "kernel": run.schedule, "whose": KERNELS.get(run.schedule, ""),
            "workload": work.to_dict(), "tile": run.tile.to_dict(), "tflops": metrics.tflops(run),
            "layer": {"time_s": metrics.time_s(run), "flops": work.flops, "hbm_bytes": moved, "compulsory_bytes": least,
                      "energy_j": energy},
            "step": {"time_s": self.step_time_s, "flops": work.flops * self.layers, "hbm_bytes": moved * self.layers,
                     "compulsory_bytes": least * self.layers, "energy_j": energy * self.layers,
                     "joules_per_million_tokens": metrics.joules_per_million_tokens(run) * self.layers,
                     "kwh_per_million_tokens": self.step_kwh_per_million_tokens},
            "others": [{"kernel": each.schedule, "time_s": metrics.time_s(each)} for each in self.others],
        }  # fmt: skip


@dataclass(frozen=True)
class Advice:
    """A model's attention on a device, each length, dtype and pass by its fastest kernel."""

    model: Model
    device: str
    layers: tuple[Layer, ...]
    notes: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """Which kernel in which dtype, what it takes, and what FP8 and the backward would."""
        plain = self._of("forward", "bf16")
        first = plain[-1]
        names = dict.fromkeys(each.run.schedule for each in plain)
        work = first.run.workload
        at = f"at {work.batch} x {work.seqlen:,} tokens" + (" causal" if work.causal else "")
        whose = KERNELS.get(first.run.schedule)
        said = [
            f"Use {' or '.join(names)} ({whose}) in bf16" if len(names) == 1 and whose else f"Use {' or '.join(names)} in bf16",
            f"a layer's forward takes {scaled(metrics.time_s(first.run), 's')} and a step's {scaled(first.step_time_s, 's')} {at}",
        ]
        text = ": ".join(said)
        eight = next((each for each in reversed(self._of("forward", "e4m3")) if each.run.workload.seqlen == work.seqlen), None)
        if eight:
            saved = 1 - metrics.time_s(eight.run) / metrics.time_s(first.run)
            text += f"; FP8 {'saves' if saved >= 0 else 'costs'} {abs(saved):.0%} of it"
        back = self._of("backward", "bf16")
        if back:
            text += f"; the backward by {back[-1].run.schedule} takes {scaled(back[-1].step_time_s, 's')} a step"
        energy = first.step_kwh_per_million_tokens + (back[-1].step_kwh_per_million_tokens if back else 0.0)
        what = "forward and backward" if back else "forward"
        return f"{text}; {what} of all layers cost {scaled(energy * 1000, 'Wh')} per million tokens."

    def _of(self, direction: str, dtype: str) -> list[Layer]:
        return [each for each in self.layers if (each.run.workload.direction, each.run.workload.dtype) == (direction, dtype)]

    def to_dict(self) -> dict:
        """As plain JSON values."""
        return {
            "sentence": self.sentence, "model": vars(self.model) | {"notes": list(self.model.notes)}, "device": self.device,
            "rows": [each.to_dict() for each in self.layers], "notes": list(self.notes),
        }  # fmt: skip


def read_config(path: Path) -> Model:
    """The model of a config.json. Raises UsageError, one sentence, for what it lacks or what no schedule here computes."""
    where = f"model configuration {path}"
    tree = read_json(path, "model configuration", 1 << 20)
    if not isinstance(tree, dict):
        raise UsageError(f"{where} is no table of fields")
    kind = str(tree.get("model_type") or "")
    name = str(tree.get("_name_or_path") or kind or path.stem)
    inner = tree.get("text_config") or tree.get("llm_config")
    if isinstance(inner, dict):
        tree = inner
    if any(tree.get(field) for field in _MLA):
        raise UsageError(f"{where} is of multi-head latent attention ({_MLA[0]}), which no schedule here computes")
    layers, heads = _whole(tree, _LAYERS, where), _whole(tree, _HEADS, where)
    kv_heads = 1 if tree.get("multi_query") is True else _whole(tree, _KV_HEADS, where, heads)
    head_dim = _whole(tree, _HEAD_DIM, where, 0)
    if not head_dim:
        hidden = _whole(tree, _HIDDEN, where)
        if hidden % heads:
            raise UsageError(f"{where}: hidden size {hidden} is no multiple of {heads} heads and there is no head_dim")
        head_dim = hidden // heads
    if heads % kv_heads:
        raise UsageError(f"{where}: {kv_heads} key and value heads do not divide {heads} heads")
    if head_dim > max(HEAD_DIMS):
        raise UsageError(f"{where}: head dim {head_dim} is more than any schedule here takes ({max(HEAD_DIMS)})")
    return Model(printable(name)[:80], layers, heads, kv_heads, head_dim, tuple(_remarks(tree, layers)))


def advise(
    model: Model,
    seqlens: Sequence[int],
    batch: int = 1,
    device: str | Device = "h200",
    causal: bool = True,
    dtypes: Sequence[str] = DTYPES,
    directions: Sequence[str] = ("forward", "backward"),
    advance: Advance | None = None,
    workers: int | None = None,
) -> Advice:
    """Predict a layer's attention by each kernel there is, for every length, dtype and pass, and keep the fastest.

    Raises UsageError where no kernel takes the model's attention on this device.
    """
    gpu = device if isinstance(device, Device) else load_device(device)
    width = min(each for each in HEAD_DIMS if each >= model.head_dim)
    notes = list(model.notes)
    if width != model.head_dim:
        notes.append(f"head dim {model.head_dim} is predicted as {width}, which kernels that pad compute")
    asked: dict[tuple, list[Question]] = {}
    for length in seqlens:
        for direction in directions:
            for dtype in dtypes:
                if dtype == "e4m3" and (direction == "backward" or not gpu.fp8_ratio):
                    continue
                shape = {"seqlen": length, "head_dim": width, "dtype": dtype, "causal": causal, "direction": direction}
                work = Workload(batch, model.heads, kv_heads=model.kv_heads, **shape)
                asked[length, direction, dtype] = [Question(work, name, gpu) for name in _names(work, gpu)]
    tell = advance or (lambda done, total, what: None)
    questions = [each for group in asked.values() for each in group]
    answers, why = {}, None
    for done, (question, answer) in enumerate(stream(questions, workers or processes()), 1):
        tell(done, len(questions), question.name)
        answers[question] = answer
        why = answer if isinstance(answer, UsageError) else why
    layers = []
    for group in asked.values():
        runs = sorted((answers[each] for each in group if isinstance(answers[each], Run)), key=metrics.time_s)
        if runs:
            exact = [replace(run, workload=replace(run.workload, head_dim=model.head_dim)) for run in runs]
            layers.append(Layer(exact[0], tuple(exact[1:]), model.layers))
    if not any(each.run.workload.direction == directions[0] for each in layers):
        raise why or UsageError(f"no kernel takes {model} on {gpu.name}")
    if any(len(each.others) and metrics.time_s(each.others[0]) / metrics.time_s(each.run) - 1 < CLOSE for each in layers):
        notes.append(f"kernels within {CLOSE:.0%} of each other are as fast for all that the model can tell")
    return Advice(model, gpu.name, tuple(layers), tuple(notes))


def _names(work: Workload, gpu: Device) -> list[str]:
    """Schedules of this pass that have a kernel and take the workload on the device."""
    names = [name for name in BACKWARD if name not in UNSHIPPED] if work.backward else list(KERNELS)
    found = [find_schedule(name, work.direction) for name in names]
    able = gpu.wgmma and gpu.tma
    return [
        each.name for each in found
        if work.head_dim in each.head_dims and work.dtype in each.dtypes and (able or not each.hopper)
    ]  # fmt: skip


def _whole(tree: dict, names: Sequence[str], where: str, otherwise: int | None = None) -> int:
    for name in names:
        if tree.get(name) is not None:
            return int(number(tree[name], int, Within(1, 1 << 20), f"{where}: {name}"))
    if otherwise is None:
        raise UsageError(f"{where} has no {names[0]}" + (f" (nor {', '.join(names[1:])})" if names[1:] else ""))
    return otherwise


def _remarks(tree: dict, layers: int) -> list[str]:
    kinds = tree.get("layer_types")
    window = tree.get("sliding_window")
    notes = []
    if isinstance(kinds, list) and len(kinds) == layers and any(kind != "full_attention" for kind in kinds):
        other = sum(kind != "full_attention" for kind in kinds)
        notes.append(f"{other} of {layers} layers are not of full attention; all are predicted as if they were: an upper bound")
    elif window and tree.get("use_sliding_window", True):
        notes.append(f"the window of {shown(window)} keys is left out: an upper bound beyond that length")
    return notes
