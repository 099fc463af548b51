"""The bar: how far from fp64 an output, an LSE or a gradient may lie.

FlashAttention's rule (its own tests, `test_flash_attn_output`): the largest error is at most twice that of PyTorch's math
attention in the same precision, plus rounding. We hold the mean error to the same. LSE is held to 1e-5 outright, because
it stays in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch

from .check import Fault

FACTOR = 2.0
LSE_TOLERANCE = 1e-5
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Bound:
    """Largest and mean error allowed."""

    largest: float
    mean: float

    @classmethod
    def of(cls, baseline: torch.Tensor, expected: torch.Tensor, lse: torch.Tensor, keys: int, units: float = 0.25) -> Bound:
        """Twice the baseline's error against the fp64 `expected`, plus rounding.

        Rounding is one unit in the last place of the largest value, on the mean `units` (a quarter, as rounding to
        nearest makes it), and what fp32 arithmetic leaves open: logits as large as the largest LSE, and a sum over `keys`
        terms in any order. NaN and Inf count as no error.
        """
        tiny = torch.finfo(baseline.dtype).smallest_normal * torch.finfo(baseline.dtype).eps
        fine = torch.finfo(torch.promote_types(baseline.dtype, torch.float32)).eps
        finite = lse[torch.isfinite(lse)]
        logit = finite.abs().max().item() if finite.numel() else 0.0
        eps, open_ = torch.finfo(baseline.dtype).eps, fine * (logit + sqrt(keys))
        error = (baseline.double() - expected).abs().nan_to_num_(0.0, 0.0, 0.0)
        size = expected.abs().nan_to_num_(0.0, 0.0, 0.0)
        if not error.numel():
            return cls(tiny, tiny)
        return cls(
            FACTOR * error.max().item() + (eps + open_) * size.max().item() + tiny,
            FACTOR * error.mean().item() + (eps * units + open_) * size.mean().item() + tiny,
        )


def hold_form(name: str, got: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise Fault unless `got` is a tensor of this shape, dtype and device."""
    if not isinstance(got, torch.Tensor):
        raise Fault(f"{name} is a {type(got).__name__}, expected a tensor")
    for what, found, wanted in (
        ("layout", got.layout, torch.strided),
        ("shape", tuple(got.shape), tuple(shape)),
        ("dtype", got.dtype, dtype),
        ("device", got.device.type, device.type),
    ):
        if found != wanted:
            raise Fault(f"{name} has {what} {found}, expected {wanted}")


def hold(name: str, axes: str, got: torch.Tensor, expected: torch.Tensor, bound: Bound) -> dict:
    """Hold `got` to `expected` (fp64, finite) within `bound`; raises Fault that names the worst element, returns figures."""
    if not expected.numel():
        return {}
    error = (got.double() - expected).abs()
    broken = ~torch.isfinite(got)
    if broken.any():
        where = int(broken.flatten().to(torch.uint8).argmax())
        raise Fault(f"{_element(name, axes, where, got, expected)}; {_extent(broken, axes)} NaN or Inf")
    largest, mean = error.max().item(), error.mean().item()
    figures = {
        "max_error": largest,
        "max_error_allowed": bound.largest,
        "mean_error": mean,
        "mean_error_allowed": bound.mean,
    }
    if largest > bound.largest:
        where = int(error.flatten().argmax())
        raise Fault(
            f"{_element(name, axes, where, got, expected)}: error {largest:.3g}, allowed {bound.largest:.3g}; "
            f"{_extent(error > bound.largest, axes)} too far off"
        )
    if mean > bound.mean:
        where = int(error.flatten().argmax())
        raise Fault(
            f"{name} drifts: mean error {mean:.3g}, allowed {bound.mean:.3g}; worst is {_element(name, axes, where, got, expected)}"
        )
    return figures


def hold_lse(got: torch.Tensor, expected: torch.Tensor) -> dict:
    """Hold LSE to 1e-5, relative above 1 and absolute below; -inf exactly where a row sees no key."""
    if not expected.numel():
        return {}
    got = got.double()
    same = got == expected  # -inf where -inf is due
    allowed = LSE_TOLERANCE * expected.abs().clamp(min=1.0)
    error = torch.where(same, 0.0, (got - expected).abs()).nan_to_num_(float("inf"), float("inf"), float("inf"))
    ratio = torch.where(same, 0.0, error / allowed).nan_to_num_(float("inf"), float("inf"), float("inf"))
    worst = ratio.max().item()
    if worst > 1.0:
        where = int(ratio.flatten().argmax())
        raise Fault(
            f"{_element('LSE', 'bhm', where, got, expected)}: {worst * LSE_TOLERANCE:.3g} off, allowed {LSE_TOLERANCE:g} "
            f"(relative above 1); {_extent(ratio > 1.0, 'bhm')} too far off"
        )
    finite = error[torch.isfinite(expected)]
    return {"lse_error": finite.max().item() if finite.numel() else 0.0}


def hold_not_finite(got: torch.Tensor, expected: torch.Tensor, bound: Bound) -> dict:
    """NaN or Inf in O exactly where attention in fp64 has them; elsewhere the ordinary rule."""
    due, is_ = ~torch.isfinite(expected), ~torch.isfinite(got)
    for wrong, sentence in (
        (due & ~is_, "swallows NaN or Inf that PyTorch propagates"),
        (is_ & ~due, "spreads NaN or Inf to where PyTorch has none"),
    ):
        if wrong.any():
            where = int(wrong.flatten().to(torch.uint8).argmax())
            raise Fault(f"{sentence}: {_element('O', 'bmhd', where, got, expected)}; {_extent(wrong, 'bmhd')} wrong")
    return hold("O", "bmhd", torch.where(due, 0.0, got.double()), torch.where(due, 0.0, expected), bound)


_AXES = {"b": "batch", "m": "row", "n": "key", "h": "head", "d": "column"}


def _element(name: str, axes: str, where: int, got: torch.Tensor, expected: torch.Tensor) -> str:
    """ "O[batch 0, row 12, head 1, column 3] is 0.11, expected 0.25"."""
    index = [int(i) for i in torch.unravel_index(torch.tensor(where), expected.shape)]
    place = ", ".join(f"{_AXES[axis]} {i}" for axis, i in zip(axes, index, strict=True))
    return f"{name}[{place}] is {got[tuple(index)].item():.6g}, expected {expected[tuple(index)].item():.6g}"


def _extent(wrong: torch.Tensor, axes: str) -> str:
    """How much of a tensor is wrong, and where: "37 of 512 elements (rows 24-39 of 40, head 1 of 2)"."""
    spans = []
    for position, axis in enumerate(axes):
        length = wrong.shape[position]
        others = [p for p in range(wrong.ndim) if p != position]
        hit = wrong.any(dim=others).nonzero().flatten() if others else wrong.nonzero().flatten()
        first, last = int(hit[0]), int(hit[-1])
        if (first, last) != (0, length - 1) and axis != "d":
            plural = "es" if axis == "b" else "s"
            spans.append(f"{_AXES[axis]}{plural if last > first else ''} {first}{f'-{last}' if last > first else ''} of {length}")
    return f"{int(wrong.sum())} of {wrong.numel()} elements" + (f" ({', '.join(spans)})" if spans else "")
