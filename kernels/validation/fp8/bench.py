"""The bench for e4m3: quantises the inputs, calls with descales, and holds the answer to fp64 of what the bytes say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ...fp8 import emulate
from ...fp8.plain import Quantised
from ...fp8.quantise import quantise
from .. import calls, criteria, kinds, layouts
from ..bench import Bench, explained
from ..check import Case, Fault, Skipped
from ..criteria import Bound
from . import diagnose

OUTPUTS = (torch.bfloat16, torch.float16, torch.float32)
LSE_OF_SCORES = 2.0**-11
"""LSE's error allowed beside twice the emulation's, of the largest LSE: a score is a sum of e4m3 products of which tensor cores
keep 14 bits, and the order in which they add them is each kernel's own."""


class Wanted(NamedTuple):
    """What a case should give: O and LSE in fp64, the bound of O's error, and LSE's."""

    out: torch.Tensor
    lse: torch.Tensor
    bound: Bound
    lse_error: float


@dataclass
class Fp8Bench(Bench):
    """A Bench whose tensors are Quantised: e4m3 values with descales in fp32."""

    @property
    def at_scale(self) -> bool:
        """Whether problems as long as people run are affordable: the emulation takes a GPU too."""
        return self.on_gpu and not self.subject.slow

    def tensors(self, case: Case) -> tuple[Quantised, Quantised, Quantised]:
        """q, k, v of `case` on the device, in its layout, quantised by heads or by the subject's blocks."""
        return self.quantised(case, *(x.to(self.device) for x in kinds.make(case, self.generator(case.name), torch.float16)))

    def quantised(self, case: Case, *qkv: torch.Tensor) -> tuple[Quantised, Quantised, Quantised]:
        """16-bit tensors as the subject takes them."""
        rows = self.rows(case)
        group = 1 if rows[0] else max(1, case.heads // max(1, case.heads_kv))
        found = [quantise(x, n, group=g) for x, n, g in zip(qkv, rows, (group, 1, 1), strict=True)]
        laid = layouts.lay_out(case.layout, *(x.values for x in found))
        return tuple(x._replace(values=values) for x, values in zip(found, laid, strict=True))

    def rows(self, case: Case) -> tuple[int | None, int | None, int | None]:
        """Rows of q, k and v that share a descale; None for a head's."""
        if self.subject.block_rows is None:
            return None, None, None
        q, kv = self.subject.block_rows(int(case.head_dim), case.seqlen_k)
        return q, kv, kv

    def call(self, q: Quantised, k: Quantised, v: Quantised, case: Case, wait: bool = True) -> tuple:
        """O and LSE (None where there is none), their form checked; raises as `Bench.call` does."""
        reason = self.subject.refuses(case)
        if reason:
            raise Skipped(reason)
        scales = dict(zip(("q_descale", "k_descale", "v_descale"), (x.descale for x in (q, k, v)), strict=True))

        def ask() -> tuple:
            given = (x.values for x in (q, k, v))
            answer = self.subject.forward(*given, causal=case.causal, softmax_scale=case.softmax_scale, **scales)
            if self.on_gpu and wait:
                torch.cuda.current_stream().synchronize()
            out, lse = (*answer, None)[:2] if isinstance(answer, (tuple, list)) and answer else (answer, None)
            return calls.plain(out), calls.plain(lse)

        out, lse = self.run(ask)
        dtype = out.dtype if isinstance(out, torch.Tensor) and out.dtype in OUTPUTS else torch.bfloat16
        criteria.hold_form("O", out, case.o_shape, dtype, self.device)
        if lse is not None:
            criteria.hold_form("LSE", lse, (case.batch, case.heads, case.seqlen_q), torch.float32, self.device)
        elif self.subject.returns_lse:
            raise Fault("LSE is missing: only O came back")
        return out, lse

    def yardstick(self, case: Case, q: Quantised, k: Quantised, v: Quantised) -> Wanted:
        """What fp64 makes of the inputs, and bounds from what FP8 arithmetic, our own kernel's, makes of them (`emulate`)."""
        line_keys = self.subject.line_keys(int(case.head_dim))
        key = (self.group, self.seed, case, self.rows(case), line_keys, self.device.type)
        if key in self.known:
            return self.known[key]
        exact = emulate.exact(q, k, v, case.softmax_scale, case.causal)
        how = replace(emulate.OURS, block=self.rows(case)[1] or emulate.OURS.block, line_keys=line_keys)
        near = emulate.attention(q, k, v, case.softmax_scale, case.causal, how)
        finite = exact.lse[torch.isfinite(exact.lse)]
        off = (near.lse.double() - exact.lse).abs().nan_to_num(0.0, 0.0, 0.0)
        largest = finite.abs().max().item() if finite.numel() else 0.0
        allowed = criteria.FACTOR * (off.max().item() if off.numel() else 0.0) + LSE_OF_SCORES * max(1.0, largest)
        bound = Bound.of(near.o.to(torch.bfloat16), exact.o, exact.lse, case.seqlen_k)
        wanted = self.known[key] = Wanted(exact.o, exact.lse, bound, allowed)
        return wanted

    def hold(self, case: Case, promise: str = "", change: Callable = lambda q, k, v: (q, k, v)) -> dict:
        """Call the subject on `case`, its quantised inputs changed by `change`, and hold O and LSE."""
        qkv = change(*self.tensors(case))
        wanted = self.yardstick(case, *qkv)
        with explained(case, promise):
            return self.compare(case, qkv, self.call(*qkv, case), wanted)

    def compare(self, case: Case, qkv: tuple, got: tuple, wanted: Wanted) -> dict:
        """Hold an answer (O, LSE); a Fault says which known mistake it equals, if any."""
        (out, lse), figures = got, {}
        try:
            if wanted.out.isfinite().all():
                figures = criteria.hold("O", "bmhd", out, wanted.out, wanted.bound)
            else:
                figures = criteria.hold_not_finite(out, wanted.out, wanted.bound)
        except Fault as fault:
            guess = diagnose.output(case, *qkv, out, wanted.bound)
            raise Fault(f"{fault}; {guess}" if guess else str(fault)) from None
        if lse is None or not lse.numel():
            return figures
        return figures | self.hold_lse(lse.double(), wanted)

    def hold_lse(self, lse: torch.Tensor, wanted: Wanted) -> dict:
        """LSE within its bound, -inf exactly where a row sees no key, NaN where fp64 has it, or where O is none for V's sake."""
        lost = ~wanted.out.isfinite().all(-1).transpose(1, 2)
        same = (lse == wanted.lse) | (lse.isnan() & (wanted.lse.isnan() | lost))
        error = torch.where(same, 0.0, (lse - wanted.lse).abs()).nan_to_num(float("inf"), float("inf"), float("inf"))
        worst = error.max().item()
        if worst > wanted.lse_error:
            at = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
            place = f"LSE[batch {at[0]}, head {at[1]}, row {at[2]}] is {lse[tuple(at)]:.6g}, expected {wanted.lse[tuple(at)]:.6g}"
            guess = diagnose.lse(lse, wanted.lse, wanted.lse_error)
            raise Fault(f"{place}: {worst:.3g} off, allowed {wanted.lse_error:.3g}" + (f"; {guess}" if guess else ""))
        return {"lse_error": worst}
