"""The arithmetic pipes: rates, latencies, chains, instruction fetch, branches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import mean, median

from .found import Derivation, Found, one


def _per_copy(column: str, what: str, *names: str) -> Callable[[dict], Found]:
    def formula(pipes: dict) -> Found:
        cycles = [pipes["cycles_per_copy"][name][column] for name in names]
        shown = ", ".join(f"{name} {value:.2f}" for name, value in zip(names, cycles, strict=True))
        return Found(mean(cycles), min(cycles), max(cycles), shown + what)

    return formula


def _pipe(*names: str) -> Callable[[dict], Found]:
    return _per_copy("cycles_at_4_warps", " cycles of a sub-partition, four warps", *names)


def _latency(*names: str) -> Callable[[dict], Found]:
    return _per_copy("latency", ", each waiting for the last", *names)


def _mufu_spacing(softmax: dict) -> Found:
    cycles = {name: entry["median"] for name, entry in softmax["cycles_per_tile"].items()}
    alone = (cycles["exp_n176_d128_wg1"] - cycles["exp_n128_d64_wg1"]) / 24
    two = (cycles["exp_n176_d128_wg2"] - cycles["exp_n128_d64_wg2"]) / 48
    how = "exp phase, cycles per element from N = 128 to 176; of two warps the other end"
    return Found(alone, min(alone, two), max(alone, two), how)


def chain(formula: Callable[[Mapping[str, float]], float], how: str) -> Callable[[dict], Found]:
    def found(chains: dict) -> Found:
        value = formula(chains["cycles"])
        return Found(value, value, value, how)

    return found


def _draw(chains: dict) -> Found:
    return one(chains["draw_cycles"]["alone"], "one CTA alone, over the SMs")


def _cold(fetch: dict, at: str) -> tuple[float, float]:
    """(first wait, cycles an instruction beyond its own) of a straight run behind `at` of other code, one warpgroup."""
    cycles = dict(zip(fetch["instructions"], fetch["cases"]["one_warpgroup"][at]["cycles"][0], strict=True))
    return cycles[64] - cycles[32] - 32, (cycles[2048] - cycles[128]) / (2048 - 128) - 1


def _fetch(number: int, how: str) -> Callable[[dict], Found]:
    def found(fetch: dict) -> Found:
        near = [_cold(fetch, f"{kib}KiB")[number] for kib in (8, 16, 32, 64)]
        return Found(median(near), min(near), max(near), f"{how}; {_cold(fetch, '192KiB')[number]:.1f} behind 192 KiB, out of L2")

    return found


_AWAY = "192KiB", "256KiB"


def _cold_fetch(fetch: dict) -> Found:
    """Of a straight run out of L2 from end to end, an instruction."""
    per = {
        case: [row[-1] / fetch["instructions"][-1] for at in _AWAY for row in fetch["cases"][case][at]["cycles"]]
        for case in ("one_warp", "one_warpgroup", "two_together")
    }
    every = [cycles for each in per.values() for cycles in each]
    first = fetch["cases"]["one_warp"]["0KiB"]["first"][0][-1] / fetch["instructions"][-1]
    how = "straight run of FFMA behind 192 and 256 KiB of other code, an instruction, whatever it does"
    return Found(median(per["one_warpgroup"]), min(every), max(every), f"{how}; the first pass of all {first:.1f}")


def _cold_fetch_latency(fetch: dict) -> Found:
    waits = [_cold(fetch, at)[0] for at in _AWAY]
    return Found(median(waits), min(waits), max(waits), "the same runs, cycles lost between instructions 32 and 64")


def _chain_and_branch(branches: dict, others: str) -> tuple[float, float, float]:
    """Eight chains of dependent FFMA beside so many softmaxes: cycles; of a branch behind one, over 64 and more; over 16."""
    cycles = {int(name.removeprefix("over_")): row[others] for name, row in branches["beside_softmax"].items()}
    return cycles[0], (mean(cycles[n] for n in cycles if n >= 64) - cycles[0]) / 8, (cycles[16] - cycles[0]) / 8


def _branch(branches: dict) -> Found:
    _, far, near = _chain_and_branch(branches, "0")
    loops = {tuple(name.split("_over_")): row["4"] for name, row in branches["loop_cycles"].items()}
    dense = mean((cycles - loops[count, "0"]) / int(count) for (count, skipped), cycles in loops.items() if skipped != "0")
    how = "taken over 16 to 256 instructions behind 16 dependent FFMA, a warp a scheduler"
    how += f"; {dense:.0f} behind independent ones"
    return Found(far, min(far, near), max(far, near), how)


def _branch_beside(branches: dict) -> Found:
    found = [_chain_and_branch(branches, others)[1:] for others in ("1", "2")]
    low, high = min(map(min, found)), max(map(max, found))
    return Found(mean(far for far, _ in found), low, high, "the same beside one and two warps in softmax")


def _chain_dilation(branches: dict) -> Found:
    alone = _chain_and_branch(branches, "0")[0]
    longer = [_chain_and_branch(branches, others)[0] / alone - 1 for others in ("1", "2")]
    how = "the same dependent FFMA without a branch, beside one and two warps in softmax"
    return Found(mean(longer), min(longer), max(longer), how)


DERIVATIONS = (
    Derivation("fma_cycles", ("pipes",), _pipe("FFMA", "FADD", "FMUL")),
    Derivation("alu_cycles", ("pipes",), _pipe("FMNMX")),
    Derivation("mufu_cycles", ("pipes",), _pipe("MUFU.EX2")),
    Derivation("mufu_spacing_cycles", ("softmax",), _mufu_spacing),
    Derivation("convert_cycles", ("pipes",), _pipe("F2FP")),
    Derivation("dependent_latency_cycles", ("pipes",), _latency("FFMA", "FADD", "FMNMX", "F2FP")),
    Derivation("shuffle_latency_cycles", ("pipes",), _latency("SHFL.BFLY")),
    Derivation("mufu_latency_cycles", ("pipes",), _latency("MUFU.EX2")),
    Derivation("vote_cycles", ("chains",), chain(lambda c: c["vote_branch"] - c["multiply"], "dependent ISETP, VOTE and BRA")),
    Derivation("divide_cycles", ("chains",), chain(lambda c: c["divide"], "dependent 32-bit divisions of one warp")),
    Derivation("branch_cycles", ("branches",), _branch),
    Derivation("branch_beside_cycles", ("branches",), _branch_beside),
    Derivation("chain_dilation", ("branches",), _chain_dilation, 2),
    Derivation("fetch_cycles", ("fetch",), _fetch(1, "straight run of FFMA behind 8 to 64 KiB of other code, an instruction"), 2),
    Derivation("fetch_latency_cycles", ("fetch",), _fetch(0, "the same runs, cycles lost between instructions 32 and 64")),
    Derivation("cold_fetch_cycles", ("fetch",), _cold_fetch, 1),
    Derivation("cold_fetch_latency_cycles", ("fetch",), _cold_fetch_latency),
    Derivation("draw_latency_cycles", ("chains",), _draw),
)
