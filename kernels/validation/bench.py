"""The bench a subject stands on: makes inputs from the seed, calls it, and holds the answer to the yardstick."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from . import calls, criteria, diagnose, kinds, layouts, yardstick
from .check import Case, Fault, Skipped, explained
from .subjects import Subject


@dataclass
class Bench:
    """One subject, one device, one dtype, one seed.

    `known` keeps what the yardstick said of a case, for several subjects under the same seed. `forward_only` holds the
    head dims without a backward, each with the reason (`survey`); `changed` what the last call changed of the process
    (`state`).
    """

    subject: Subject
    device: torch.device
    dtype: torch.dtype
    seed: int = 0
    quick: bool = False
    group: str = ""
    known: dict = field(default_factory=dict)
    forward_only: dict = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)

    @property
    def tile(self) -> int:
        """The length whose neighbours are worth a look."""
        return self.subject.tile

    @property
    def head_dims(self) -> tuple[int, ...]:
        """The head dims to check; the first alone where time is short."""
        return self.subject.head_dims[:1] if self.quick else self.subject.head_dims

    @property
    def on_gpu(self) -> bool:
        """Whether streams, a busy device and much memory are at hand."""
        return self.device.type == "cuda"

    @property
    def at_scale(self) -> bool:
        """Whether problems as long as people run are affordable."""
        return self.on_gpu and not self.subject.slow

    def generator(self, name: str) -> torch.Generator:
        """Random numbers that depend on the seed, the group and `name` only."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{self.group}/{name}".encode()))

    def tensors(self, case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v of `case` on the device, in its layout."""
        made = kinds.make(case, self.generator(case.name), self.dtype)
        return layouts.lay_out(case.layout, *(x.to(self.device) for x in made))

    def no_backward(self, case: Case) -> str:
        """Why there is no backward for `case`, or an empty string."""
        if self.subject.differentiable is False:
            return "forward only"
        return self.forward_only.get(case.head_dim, "")

    def dout(self, case: Case, name: str = "dO") -> torch.Tensor:
        """dO: N(0, 1) in the shape of O."""
        return kinds.normal(case.o_shape, self.generator(name)).to(self.dtype).to(self.device)

    def like(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """N(0, 1) in the shape of `tensor`."""
        return kinds.normal(tuple(tensor.shape), self.generator(name)).to(self.dtype).to(self.device)

    def call(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: Case, wait: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """O and LSE (None where the subject returns none), with their form checked; `wait` for the GPU to be done.

        Raises Skipped where the subject does not promise `case` or refuses it (`calls`), Fault where it raises or where the
        form is wrong.
        """
        reason = self.subject.refuses(case)
        if reason:
            raise Skipped(reason)

        def ask() -> tuple:
            answer = self.subject.forward(q, k, v, causal=case.causal, softmax_scale=case.softmax_scale, **case.keywords)
            if self.on_gpu and wait:
                torch.cuda.current_stream().synchronize()
            out, lse = (*answer, None)[:2] if isinstance(answer, (tuple, list)) and answer else (answer, None)
            return calls.plain(out), calls.plain(lse)

        def again() -> None:
            calls.refill(q, k, v)
            ask()

        out, lse = self.run(ask, again)
        criteria.hold_form("O", out, case.o_shape, self.dtype, self.device)
        if lse is not None:
            wide = torch.float64 if self.dtype == torch.float64 else torch.float32
            criteria.hold_form("LSE", lse, (case.batch, case.heads, case.seqlen_q), wide, self.device)
        elif self.subject.returns_lse:
            raise Fault("LSE is missing: only O came back")
        return out, lse

    def run(self, work: Callable, again: Callable | None = None, doing: str = "") -> object:
        """What `work` returns, a call of the subject: contained, and what it raises as Skipped or Fault (`calls.settle`)."""
        try:
            with calls.contained() as self.changed:
                return work()
        except (KeyboardInterrupt, Skipped, Fault):
            raise
        except BaseException as error:  # whatever a kernel raises is a finding, in one line
            calls.settle(error, again or work, self.subject.strict, doing)

    def yardstick(self, case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple:
        """(O, LSE, Bound) for `case`, from memory where it was asked before under this seed."""
        key = (self.group, self.seed, case, self.dtype, self.device.type)
        if key not in self.known:
            answer = yardstick.bound(q, k, v, case.causal, case.softmax_scale)
            if answer[0].numel() > 1 << 22:
                return answer
            self.known[key] = answer
        return self.known[key]

    def hold(self, case: Case, promise: str = "") -> dict:
        """Call the subject on `case` and hold O and LSE; a Fault names inputs, element, and what it looks like."""
        q, k, v = self.tensors(case)
        wanted = self.yardstick(case, q, k, v)
        with explained(case, promise):
            return self.compare(case, (q, k, v), self.call(q, k, v, case), wanted)

    def compare(self, case: Case, qkv: tuple, got: tuple, wanted: tuple) -> dict:
        """Hold an answer (O, LSE) to `wanted` (O, LSE, Bound); a Fault says which known mistake it equals, if any."""
        (out, lse), (exact, exact_lse, bound) = got, wanted
        try:
            figures = criteria.hold("O", "bmhd", out, exact, bound)
        except Fault as fault:
            guess = diagnose.output(case, *qkv, out, bound)
            raise Fault(f"{fault}; {guess}" if guess else str(fault)) from None
        if lse is None:
            return figures
        try:
            return figures | criteria.hold_lse(lse, exact_lse)
        except Fault as fault:
            guess = diagnose.lse(case, *qkv, lse, exact_lse)
            raise Fault(f"{fault}; {guess}" if guess else str(fault)) from None
