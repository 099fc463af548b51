"""Compares the CUDA backward with fp64 on random and adversarial inputs: `python -m fasim.kernels.cuda.backward.check`.

Every case prints one line: the root mean square and the largest error of dQ, dK and dV against the fp64 oracle, over the root mean
square and the largest of the oracle. A failing one prints a map of its error by tile of 64 rows too. Cases run in a process of
their own until one dies; the next then goes on with the case after. Memory is poisoned with NaN before each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from ....simulator.reading import parse_json

TOLERANCE = {"fp16": 3e-3, "bf16": 2e-2}
"""Of the root mean square error over the oracle's: four to six times the rounding of the operands."""
LARGEST = 6
"""The largest error over the largest of the oracle may be as many times TOLERANCE."""
ROWS = 64
POISON_BYTES = 1 << 30
CASE_SECONDS = 8


@dataclass(frozen=True)
class Case:
    """One problem; `kind` is how its inputs are made."""

    seqlen_q: int
    seqlen_k: int
    head_dim: int
    causal: bool
    dtype: str = "bf16"
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    kind: str = "normal"
    dlse: bool = False
    deterministic: bool = False
    schedule: str = "fa3"

    @property
    def name(self) -> str:
        """On one line."""
        flags = " dlse" * self.dlse + " deterministic" * self.deterministic
        mask, heads = "causal" if self.causal else "full", f"{self.batch}x{self.heads}/{self.kv_heads}"
        lengths = f"{self.seqlen_q}x{self.seqlen_k}"
        return f"{self.schedule} {self.dtype} d{self.head_dim} {mask} {heads} {lengths} {self.kind}{flags}"


def cases(schedule: str, head_dims: tuple[int, ...], deterministic: bool) -> list[Case]:
    """Small whole tiles first, then what is ragged, grouped, strided, masked and extreme."""
    found = []
    for head_dim in head_dims:
        for causal in (False, True):
            add = lambda *lengths, head_dim=head_dim, causal=causal, **fields: found.append(  # noqa: E731
                Case(*lengths, head_dim, causal, schedule=schedule, deterministic=deterministic, **fields)
            )
            add(64, 128)
            add(128, 128)
            add(640, 640)
            for dtype in ("fp16", "bf16"):
                add(1024, 1024, batch=2, heads=4, kv_heads=4, dtype=dtype)
                add(1000, 1000, batch=2, heads=8, kv_heads=2, dtype=dtype)
                add(333, 777, heads=6, kv_heads=1, dtype=dtype)
                add(777, 333, heads=2, kv_heads=1, dtype=dtype, dlse=True)
            for lengths in ((1, 1), (1, 300), (300, 1), (63, 65), (81, 129), (128, 1025), (1025, 128), (129, 257)):
                add(*lengths)
            for kind in ("strided", "large", "negative", "ones", "far", "nan beyond"):
                add(500, 500, heads=4, kv_heads=2, kind=kind)
            add(2048, 2048, batch=2, heads=16, kv_heads=16, dlse=True)
            add(4096, 4096, heads=8, kv_heads=1)
            add(1024, 1024, batch=7, heads=16, kv_heads=16)  # more heads than have sums at a time
            add(2048, 2048, batch=3, heads=16, kv_heads=4)
    return found


def say(text: str) -> None:
    """A line, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def has_gpu() -> bool:
    """Whether there is any."""
    import torch

    return torch.cuda.is_available()


def inputs(case: Case):
    """q, k, v, do, dlse, scale."""
    import torch

    generator = torch.Generator("cuda").manual_seed(7)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[case.dtype]

    def normal(seqlen, heads):
        shape = (case.batch, seqlen, heads, case.head_dim)
        if case.kind == "strided":  # (B, H, S, D) beneath, and room between rows
            wide = torch.randn(case.batch, heads, seqlen, case.head_dim + 8, device="cuda", generator=generator).to(dtype)
            return wide.transpose(1, 2)[..., : case.head_dim]
        return torch.randn(shape, device="cuda", generator=generator).to(dtype)

    q, do = normal(case.seqlen_q, case.heads), normal(case.seqlen_q, case.heads)
    k, v = normal(case.seqlen_k, case.kv_heads), normal(case.seqlen_k, case.kv_heads)
    scale = case.head_dim**-0.5
    if case.kind == "large":
        q, k = q * 6, k * 6
    if case.kind == "ones":
        q, k = torch.ones_like(q), torch.ones_like(k)
    if case.kind == "far":  # every score far below zero: exp2(0 - LSE) of a row of zeros would overflow
        q, k = q.abs() * 6, -k.abs() * 6
    if case.kind == "negative":
        scale = -scale
    dlse = torch.randn(case.batch, case.heads, case.seqlen_q, device="cuda", generator=generator) if case.dlse else None
    return q, k, v, do, dlse, scale


def run(case: Case, dump: Path | None) -> bool:
    """One case: prints its line, and whether it passes."""
    import torch

    from ...reference import attention_backward, attention_forward
    from . import launch

    q, k, v, do, dlse, scale = inputs(case)
    o, lse = attention_forward(q, k, v, scale, case.causal)
    wanted = attention_backward(q, k, v, do, scale, case.causal, dlse)
    o, lse = o.to(q.dtype), lse.float()
    if case.kind == "strided":
        o = o.transpose(1, 2).contiguous().transpose(1, 2)
        lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    if case.kind == "nan beyond":  # what lies behind the tensors must not be read into them
        k, v, q, do, o = (_followed_by_nan(x) for x in (k, v, q, do, o))
    poison = torch.full((POISON_BYTES // 4,), float("nan"), device="cuda")
    del poison
    call = lambda: launch.backward(  # noqa: E731
        q, k, v, o, lse, do, dlse, causal=case.causal, scale=scale, schedule=case.schedule, deterministic=case.deterministic
    )
    found = call()
    torch.cuda.synchronize()
    again = call()
    torch.cuda.synchronize()
    failed, parts = [], []
    tolerance = TOLERANCE[case.dtype]
    for name, x, y, repeated in zip(("dq", "dk", "dv"), found, wanted, again, strict=True):
        error = (x.double() - y).abs()
        rms = float((error.square().mean() / y.square().mean().clamp_min(1e-30)).sqrt())
        largest = float(error.max() / y.abs().max().clamp_min(1e-30))
        same = torch.equal(x, repeated)
        parts.append(f"{name} {rms:.1e} {largest:.1e}{'' if same else ' ~'}")
        floor = float(y.abs().max()) < 1e-6  # gradients that vanish: only absolute errors say something
        good = float(error.max()) < 1e-2 if floor else rms <= tolerance and largest <= LARGEST * tolerance
        if not good or (not same and (name != "dq" or case.deterministic)):
            failed.append((name, x, y, error))
    say(f"{'FAIL' if failed else 'ok  '} {case.name}: {'; '.join(parts)}")
    for name, x, y, error in failed:
        _map(name, x, y, error)
    if failed and dump and q.numel() + k.numel() < 1 << 18:
        torch.save(
            {"case": asdict(case), "q": q, "k": k, "v": v, "do": do, "o": o, "lse": lse, "found": found, "wanted": wanted},
            dump / f"{case.name.replace(' ', '_').replace('/', '-')}.pt",
        )
    return not failed


def _map(name: str, x, y, error) -> None:
    """The largest error of each tile of 64 rows and 64 columns, relative to the largest of the oracle, first heads."""
    import torch

    top = float(y.abs().max())
    _, seqlen, heads, head_dim = x.shape
    bad = torch.nonzero(~(error <= 0.05 * top))
    nan = int(torch.isnan(x).sum())
    say(f"  {name}: {len(bad)} of {x.numel()} off by more than 5 % of {top:.3g}; NaN {nan}; first {bad[:3].tolist()}")
    for head in range(min(heads, 2)):
        for row in range(0, min(seqlen, 8 * ROWS), ROWS):
            tile = error[0, row : row + ROWS, head]
            largest = [float(tile[:, c : c + 64].nan_to_num(9e9).max()) / max(top, 1e-30) for c in range(0, head_dim, 64)]
            say(f"    head {head} rows {row:5d}: {' '.join(f'{x:8.1e}' for x in largest)}")
    for b, s, h, _ in bad[:1].tolist():
        for what, values in (("found ", x), ("wanted", y)):
            say(f"    {what} {[round(float(e), 3) for e in values[b, s, h, :12]]}")


def _followed_by_nan(x):
    """The same values in front of as many NaN, along the rows and behind the last batch entry."""
    import torch

    batch, seqlen, heads, head_dim = x.shape
    wide = torch.full((batch, seqlen + 256, heads, head_dim), float("nan"), dtype=x.dtype, device=x.device)
    wide[:, :seqlen] = x
    return wide[:, :seqlen]


def main() -> int:
    """All cases; exit status 1 where one failed or died."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedule", default="fa3")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--whole-tiles", action="store_true", help="no tile of keys is shared by two CTAs")
    parser.add_argument("--dump", type=Path)
    parser.add_argument("--from-case", type=int)
    args = parser.parse_args()
    if not has_gpu():
        say("no GPU here: it needs an H100 or H200")
        return 3
    everything = cases(args.schedule, tuple(args.head_dims), args.deterministic)
    if args.from_case is not None:
        from . import launch

        launch.SHARE_TILES = not args.whole_tiles
        return _worker(everything, args.from_case, args.dump)
    bad, at = 0, 0
    while at < len(everything):
        status, done, failures = _child(at)
        bad += failures
        at = done
        if status and at < len(everything):
            say(f"DIED {everything[at].name}: exit status {status}")
            bad, at = bad + 1, at + 1
    say(f"{len(everything) - bad} of {len(everything)} cases pass")
    return int(bad > 0)


def _child(at: int) -> tuple[int, int, int]:
    """Cases from `at` on in another process: its exit status, the case it reached, how many failed."""
    command = [sys.executable, "-m", "fasim.kernels.cuda.backward.check", *sys.argv[1:], "--from-case", str(at)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    failures, seconds = 0, 40
    import selectors

    with selectors.DefaultSelector() as waiting:
        waiting.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not waiting.select(seconds):
                process.kill()
                return 124, at, failures
            line = process.stdout.readline()
            if not line:
                return process.wait(), at, failures
            if line.startswith("@"):
                at, passed = parse_json(line[1:], "a case's line")
                failures += not passed
                seconds = CASE_SECONDS
            else:
                say(line.rstrip("\n"))


def _worker(everything: list[Case], at: int, dump: Path | None) -> int:
    for i in range(at, len(everything)):
        passed = run(everything[i], dump)
        say(f"@[{i + 1}, {json.dumps(passed)}]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
