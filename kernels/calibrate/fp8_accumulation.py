"""How Hopper's tensor cores add e4m3 products: how many bits they keep, and whether they round.

`python -m kernels.calibrate.fp8_accumulation --out DIR` writes `DIR/fp8_accumulation.json`. A question is one sum of up to 32
products and an accumulator, whose answer tells two hypotheses apart. Random problems are then held to `fp8/tensor_cores.py` bit
by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..cuda.fp8.wgmma import wrappers
from ..fp8.tensor_cores import HOPPER, Accumulation, multiply
from .harness import HERE, Module, parse_out, write
from .ptx import PRELUDE

ROWS, COLUMNS, BYTES, DEPTH = 64, 32, 128, 32
E4M3 = torch.float8_e4m3fn
TRIED_BITS = range(6, 24)
RANDOM_PROBLEMS = 64

Multiply = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(a, b, c) -> c + a b^T in fp32; a (problems, 64, K) and b (problems, 32, K) in e4m3, c (problems, 64, 32), K of 32 to 128."""


@dataclass(frozen=True)
class Question:
    """Products by their place in the instruction, as pairs of factors, and the accumulator they are added to."""

    products: dict[int, tuple[float, float]] = field(default_factory=dict)
    accumulator: float = 0.0


def power(exponent: int) -> tuple[float, float]:
    """2^exponent as a product of two e4m3 numbers, for -18 to 16."""
    first = max(-9, min(8, exponent // 2))
    return 2.0**first, 2.0 ** (exponent - first)


def scaled(factors: tuple[float, float], by: float) -> tuple[float, float]:
    """The same product times a number that e4m3 can take up in the first factor."""
    return factors[0] * by, factors[1]


def questions(bits: int = HOPPER.fraction_bits) -> dict[str, Question]:
    """The last of them suppose that `bits` fraction bits are kept: beside a product of 2^8 the last is 2^(8 - bits)."""
    big, last = power(8), 8 - bits
    found = {f"product {t} below": Question({0: big, 1: power(8 - t)}) for t in TRIED_BITS}
    found |= {f"accumulator of {t}": Question({}, 1.0 + 2.0**-t) for t in TRIED_BITS}
    found |= {f"product {t} below the accumulator": Question({0: power(-t)}, 1.0) for t in TRIED_BITS if t <= 18}
    one_and_a_half = scaled(power(last), 1.5)
    return found | {
        "one and a half units": Question({0: big, 1: one_and_a_half}),
        "minus one and a half units": Question({0: big, 1: scaled(one_and_a_half, -1.0)}),
        "four half units": Question({0: big} | {1 + n: power(last - 1) for n in range(4)}),
        "two units beside 30 x 30": Question({0: (30.0, 30.0), 1: power(last), 2: power(last)}),
        "halves apart": Question({0: big, 1: scaled(big, -1.0), 16: power(last - 2)}),
        "quarters apart": Question({0: big, 1: scaled(big, -1.0), 8: power(last - 2)}),
        "a cancelled sum's low bits": Question({0: big, 1: scaled(big, -1.0), 2: power(last), 3: power(last - 1)}),
        "a denormal factor": Question({0: (2.0**-9, 1.0)}, 0.0),
        "a denormal beside 2^-6": Question({0: (2.0**-6, 1.0), 1: (2.0**-9, 2.0**-4)}),
    }


def asked(ask: Multiply, these: dict[str, Question]) -> dict[str, float]:
    """The answers: question i stands in row i of A and of B."""
    problems = -(-len(these) // COLUMNS)
    a, b = torch.zeros(problems, ROWS, DEPTH), torch.zeros(problems, COLUMNS, DEPTH)
    c = torch.zeros(problems, ROWS, COLUMNS)
    for number, question in enumerate(these.values()):
        problem, row = divmod(number, COLUMNS)
        c[problem, row, row] = question.accumulator
        for place, (left, right) in question.products.items():
            a[problem, row, place], b[problem, row, place] = left, right
    d = ask(a.to(E4M3), b.to(E4M3), c)
    return {name: float(d[number // COLUMNS, number % COLUMNS, number % COLUMNS]) for number, name in enumerate(these)}


def conclude(ask: Multiply) -> dict:
    """What the answers say of whoever adds: bits kept of products, of an accumulator, and how they are cut off."""

    def most(answers: dict[str, float], name: str, without: float) -> int | None:
        kept = [t for t in TRIED_BITS if name.format(t) in answers and answers[name.format(t)] != without]
        return max(kept) if kept else None

    first = asked(ask, questions())
    bits = most(first, "product {} below", 2.0**8)
    if bits is None:
        return {"answers": first}
    answers = asked(ask, questions(bits))
    big, unit = 2.0**8, 2.0 ** (8 - bits)

    def units(name: str, beside: float = big) -> float:
        return (answers[name] - beside) / unit

    return {
        "fraction_bits_of_products": bits,
        "fraction_bits_of_the_accumulator": most(answers, "accumulator of {}", 1.0),
        "fraction_bits_beside_the_accumulator": most(answers, "product {} below the accumulator", 1.0),
        "truncates": units("one and a half units") == 1 and units("minus one and a half units") == -1,
        "cuts_each_product": units("four half units") == 0,
        "product_exponent_is_the_sum_of_its_factors": answers["two units beside 30 x 30"] == 900.0 + 2 * unit,
        "adds_all_at_once": answers["halves apart"] == 0 and answers["quarters apart"] == 0,
        "answers": answers,
    }


def random_problems(count: int = RANDOM_PROBLEMS, depth: int = BYTES, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes of every magnitude but NaN, and accumulators of 14 bits near the products' size, for some 0."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int) -> Tensor:
        drawn = torch.randint(0, 256, (count, rows, depth), generator=generator, dtype=torch.uint8)
        narrow = torch.randn(count, rows, depth, generator=generator).to(E4M3).view(torch.uint8)
        wide = torch.where(drawn % 128 == 127, drawn - 1, drawn)
        return torch.where(torch.arange(count)[:, None, None] % 2 == 0, narrow, wide).view(E4M3)

    c = torch.randn(count, ROWS, COLUMNS, generator=generator) * 2.0 ** torch.randint(-8, 9, (count, 1, 1), generator=generator)
    return draw(ROWS), draw(COLUMNS), c * (torch.arange(count)[:, None, None] % 3 > 0)


def compare(ask: Multiply, how: Accumulation = HOPPER) -> dict:
    """How many answers to the random problems are those of the model, bit by bit."""
    a, b, c = random_problems()
    got = ask(a, b, c).cpu()
    wanted = torch.stack([multiply(*each, how) for each in zip(a, b, c, strict=True)])
    differs = got.view(torch.int32) != wanted.view(torch.int32)
    error = ((got - wanted).abs() / wanted.abs().clamp(min=1e-30)).max()
    return {"answers": got.numel(), "other_bits": int(differs.sum()), "largest_relative_difference": float(error)}


def source() -> str:
    """The whole CUDA source."""
    return PRELUDE + wrappers((COLUMNS,)) + (HERE / "fp8_accumulation.cu").read_text()


def on_the_gpu(module: Module) -> Multiply:
    """What the tensor cores answer."""

    def ask(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        wide = [torch.nn.functional.pad(x.view(torch.uint8), (0, BYTES - x.shape[2])).cuda() for x in (a, b)]
        c = c.float().contiguous().cuda()
        d = torch.empty_like(c)
        module.launch("multiply", len(a), 128, [*wide, c, d, a.shape[2] // DEPTH])
        torch.cuda.synchronize()
        return d.cpu()

    return ask


def main() -> None:
    """Ask the GPU and write the result."""
    out = parse_out(__doc__)
    text = source()
    ask = on_the_gpu(Module(text))
    results = conclude(ask) | {"model": compare(ask)}
    write(out, "fp8_accumulation", "kernels/calibrate/fp8_accumulation.py", text, results)


if __name__ == "__main__":
    main()
