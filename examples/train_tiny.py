"""Train a tiny transformer with fasim's attention and with PyTorch's, and set the loss curves side by side.

    python examples/train_tiny.py --steps 300 --schedule fa2
    python examples/train_tiny.py --schedule auto --backward lagged

A byte-level language model (2 layers, 4 heads of 64) learns the source of Python's argparse from the same seed three
times: with PyTorch's FlashAttention-2 backend, with its math backend, and with `flash_attn_func`. The two PyTorch runs
say how far apart two correct kernels drift; ours must stay as near. Exit status: 0 same curve, 1 another, 3 no GPU.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

HEADS, HEAD_DIM, LAYERS, LENGTH, BATCH = 4, 64, 2, 256, 16
WINDOW = 20  # steps that a point of the curve averages


class Block(nn.Module):
    """Attention, then an MLP, each on a normalised residual stream."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.attend = attend
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.before_attention(x)).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
        x = x + self.out(self.attend(q, k, v).flatten(2))
        return x + self.mlp(self.before_mlp(x))


class Model(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(attend) for _ in range(LAYERS)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.bytes(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.blocks(x))


def pytorch(backend: SDPBackend) -> Attend:
    """PyTorch's causal attention by one backend, on (B, S, H, D)."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
        return out.transpose(1, 2)

    return attend


def ours(schedule: str, backward: str) -> Attend:
    """`flash_attn_func` by one schedule, its gradients by another."""
    from fasim.kernels.ops import flash_attn_func

    return lambda q, k, v: flash_attn_func(q, k, v, causal=True, schedule=schedule, backward=backward)


def train(attend: Attend, steps: int, seed: int = 0) -> list[float]:
    """Loss of every step, from the same weights and the same batches for the same seed."""
    torch.manual_seed(seed)
    text = torch.frombuffer(bytearray(inspect.getsource(argparse), "utf-8"), dtype=torch.uint8).long()
    model = Model(attend).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    picks = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(text) - LENGTH - 1, (BATCH,), generator=picks)
        batch = torch.stack([text[start : start + LENGTH + 1] for start in starts]).cuda()
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def smooth(losses: list[float]) -> list[float]:
    """Mean over windows of WINDOW steps."""
    return [sum(losses[i : i + WINDOW]) / len(losses[i : i + WINDOW]) for i in range(0, len(losses), WINDOW)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--schedule", default="fa2", help="auto, standard, fa1 or fa2")
    parser.add_argument("--backward", default="auto", help="schedule of the gradients: auto, fa2 (Triton) or a CUDA one")
    parser.add_argument("--out", type=Path, help="write the curves as JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("train_tiny needs a CUDA GPU", file=sys.stderr)
        return 3
    name = options.schedule if options.backward == "auto" else f"{options.schedule}, {options.backward} backward"
    runs = {
        "torch-fa2": pytorch(SDPBackend.FLASH_ATTENTION),
        "torch-math": pytorch(SDPBackend.MATH),
        name: ours(options.schedule, options.backward),
    }
    curves = {name: smooth(train(attend, options.steps)) for name, attend in runs.items()}
    flash, math, mine = curves.values()
    noise = max(abs(a - b) for a, b in zip(flash, math, strict=True))
    apart = max(abs(a - b) for a, b in zip(flash, mine, strict=True))
    same = apart <= max(2 * noise, 0.02)
    print("step  " + "".join(f" {each:>11}" for each in curves))
    for place, row in enumerate(zip(*curves.values(), strict=True)):
        cells = (f" {loss:{max(11, len(each))}.4f}" for each, loss in zip(curves, row, strict=True))
        print(f"{(place + 1) * WINDOW:>4}  " + "".join(cells))
    verdict = "same curve" if same else "another curve"
    print(f"{name} is at most {apart:.4f} from torch-fa2, torch-math at most {noise:.4f}: {verdict}")
    if options.out:
        found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "steps": options.steps, "window": WINDOW}
        found |= {"curves": curves, "noise": noise, "apart": apart, "same": same}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
