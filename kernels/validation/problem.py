"""What gradients are asked of."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Problem(NamedTuple):
    """What gradients are asked of: q, k, v and the gradients of O and LSE; None where nothing depends on it."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    do: torch.Tensor | None
    dlse: torch.Tensor | None = None

    @property
    def qkv(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The inputs."""
        return self.q, self.k, self.v
