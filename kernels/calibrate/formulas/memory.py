"""HBM, L2, TMA, and what stores and adds take."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from statistics import NormalDist, mean

from .found import Derivation, Found, one


def _hbm_efficiency(memory: dict) -> Found:
    rate = {name: entry["bytes_per_s"] / 4.8e12 for name, entry in memory["hbm"].items()}
    best = {kind: max(value for name, value in rate.items() if name.startswith(kind)) for kind in ("read", "write", "copy")}
    how = "the best write loop over the datasheet's 4.8 TB/s, between the best copy and the best read"
    return Found(best["write"], best["copy"], best["read"], how)


def _hbm_read_efficiency(memory: dict) -> Found:
    rates = [entry["bytes_per_s"] / 4.8e12 for name, entry in memory["hbm"].items() if name.startswith("read")]
    return Found(max(rates), min(rates), max(rates), "the best read loop over the datasheet's 4.8 TB/s")


def _l2_miss(l2: dict, mib: int) -> float:
    """Share of a warm buffer that HBM delivered, mean of the patterns in which every line is read by many SMs."""
    return mean(max(0.0, l2[f"{mib}MiB_{pattern}"]["warm_hbm_bytes_over_buffer"]) for pattern in ("same", "four_groups"))


def _l2_distance(l2: dict) -> tuple[float, float]:
    """Mean and standard deviation of the reuse distance at which a line is lost, over a partition's 30 MiB."""
    normal, half = NormalDist(), 30.0
    low, high = (normal.inv_cdf(min(0.999, max(0.001, _l2_miss(l2, mib)))) for mib in (28, 32))
    spread = (32 - 28) / half / (high - low)
    return 32 / half - high * spread, spread


def _l2_fraction(l2: dict) -> Found:
    how = "buffers that all SMs read: missed at 28, 32 and 36 MiB " + ", ".join(f"{_l2_miss(l2, mib):.2f}" for mib in (28, 32, 36))
    return Found(_l2_distance(l2)[0], 28 / 30, 36 / 30, f"{how}; each half of L2 keeps its own copy in 30 MiB")


def _l2_spread(l2: dict) -> Found:
    spread = _l2_distance(l2)[1]
    return Found(spread, spread, spread, "a normal distribution through the misses at 28 and 32 MiB")


def _ways_of(misses: Mapping[int, float]) -> int:
    """Lines of a set in a cache of about 30 MiB that loses lines as recorded, {MiB: share missed}, if their sets are chance."""

    def worst(ways: int, quarters: int) -> float:
        off = []
        for mib, missed in misses.items():
            load = ways * mib * 4 / quarters
            kept = sum(math.exp(-load) * load**k / math.factorial(k) for k in range(ways))
            off.append(abs(1 - kept - missed))
        return max(off)

    return min((worst(ways, quarters), ways) for ways in range(8, 41) for quarters in range(116, 125))[1]


def _l2_ways(sets: dict) -> Found:
    found = {}
    for width in (256, 512):
        misses = {int(size[:-3]): seen["warm_over_size"] for size, seen in sets[f"slice_{width}"].items()}
        found[width] = _ways_of(misses)
    how = f"misses of slices of 4 KiB rows, 16 to 40 MiB, as if sets were chance: {found[256]} by 256 bytes, {found[512]} by 512"
    return Found(found[256], min(found.values()), max(found.values()), how)


def _l2_rate(memory: dict) -> Found:
    rates = [memory["streams"][f"{mib}MiB_132sm_8stages_four_groups"]["bytes_per_clk_chip"] for mib in (8, 16)]
    return Found(mean(rates), min(rates), max(rates), "TMA of 132 SMs in four groups that read the same tiles, as four heads do")


def _l2_rate_of_one(memory: dict) -> Found:
    rates = [entry["bytes_per_clk_per_sm"] for name, entry in memory["streams"].items() if re.search(r"_1sm_(4|8|12)stages", name)]
    return Found(max(rates), min(rates), max(rates), "TMA of one SM, four stages or more")


def _hbm_latency(memory: dict) -> Found:
    return one(memory["load_latency"]["hbm_same_2mib_pages"], "plain load that misses L2")


def _l2_latency(memory: dict) -> Found:
    return one(memory["load_latency"]["l2_hit_all_sms"], "plain load that hits, over SMs and lines")


def _tma_latency(memory: dict) -> Found:
    fit, plain = memory["tma_latency"]["fit_cycles_over_bytes"]["l2_hit"], memory["load_latency"]["l2_hit_all_sms"]["median"]
    value, off = fit["intercept"] - plain, fit["worst_residual"]
    how = f"TMA that hits L2 takes {fit['intercept']:.0f} at no bytes, a plain load {plain:.0f}"
    return Found(value, value - off, value + off, how)


def _tma_store(memory: dict) -> tuple[float, float]:
    """(bytes per cycle, cycles at no bytes) until a copy out lets go of shared memory; a row is 128 bytes."""
    stores = memory["tma_latency"]["stores"]
    short, long = (stores[f"rows_{rows}"]["smem_reusable"]["median"] for rows in (64, 128))
    rate = 64 * 128 / (long - short)
    return rate, short - 64 * 128 / rate


def _tma_store_rate(memory: dict) -> Found:
    rate, _ = _tma_store(memory)
    return Found(rate, rate, rate, "TMA store of 64 rows of 128 bytes more, until shared memory may be reused")


def _tma_store_latency(memory: dict) -> Found:
    _, latency = _tma_store(memory)
    return Found(latency, latency, latency, "the same TMA stores, at no bytes")


def _add_rate(reduce_add: dict) -> Found:
    rates = [reduce_add["bulk"][f"{pattern}_132"]["bytes_per_clk_chip"] for pattern in ("apart", "same", "scattered")]
    how = "bulk copies of 132 SMs that add fp32 in L2, each its own tiles; all the same at once 4 % less; red.global alike"
    return Found(rates[0], min(rates), max(rates), how)


def _add_rate_of_one(reduce_add: dict) -> Found:
    both = reduce_add["bulk"] | reduce_add["red"]
    alone = [found["bytes_per_clk_chip"] for name, found in both.items() if name.endswith("_1")]
    rate = reduce_add["bulk"]["apart_1"]["bytes_per_clk_chip"]
    return Found(rate, min(alone), max(alone), "bulk copies of one SM that add fp32 in L2, two under way; red.global alike")


def _tma_issue(memory: dict) -> Found:
    return one(memory["tma_latency"]["loads"]["rows_128"]["issue"], "issue of one load")


def _l2_lookup_rate(loaded: dict) -> Found:
    rates = [row["bytes_per_clk_chip"] for row in loaded["hit"]["by_interval"].values()]
    full = [rate for rate in rates if rate > 0.97 * max(rates)]
    return Found(max(full), min(full), max(full), "TMA of all SMs, each on its own way through the same 16 MiB")


def _l2_sharing(loaded: dict) -> Found:
    """Slope of the lookups against the number of SMs, both in logarithms, where SMs are apart by half a K/V block or so."""
    seen = {}
    for name, lookups in loaded["lookups"].items():
        sms, jitter = map(int, name.split("_"))
        if sms > 1:
            seen.setdefault(jitter, []).append(-math.log(lookups) / math.log(sms))
    apart = seen[max(seen)]
    how = f"lookups over deliveries of 2 to 132 SMs that read the same tiles within {max(seen):,} cycles"
    return Found(mean(apart), min(apart), max(apart), how)


def _queue(kind: str, what: str) -> Callable[[dict], Found]:
    def formula(loaded: dict) -> Found:
        rows = list(loaded[kind]["by_interval"].values())
        rate, least = max(row["bytes_per_clk_chip"] for row in rows), min(row["mean_latency"] for row in rows)
        pairs = [(row["bytes_per_clk_chip"] / rate, row["mean_latency"] - least) for row in rows]
        pairs = [(u / (2 * (1 - u)), waited) for u, waited in pairs if u < 0.9]
        slope = sum(x * waited for x, waited in pairs) / sum(x * x for x, _ in pairs)
        worst = max(abs(waited - slope * x) for x, waited in pairs)
        how = f"32 KiB by TMA that {what}, all SMs, {len(pairs)} rates up to 0.9 of the highest: within {worst:.0f} cycles of it"
        return Found(slope, slope, slope, how)

    return formula


DERIVATIONS = (
    Derivation("hbm_efficiency", ("memory",), _hbm_efficiency, 3),
    Derivation("hbm_read_efficiency", ("memory",), _hbm_read_efficiency, 3),
    Derivation("hbm_latency_cycles", ("memory",), _hbm_latency),
    Derivation("l2_effective_fraction", ("l2_capacity",), _l2_fraction, 3),
    Derivation("l2_spread", ("l2_capacity",), _l2_spread, 3),
    Derivation("l2_ways", ("l2_sets",), _l2_ways),
    Derivation("l2_bytes_per_cycle", ("memory",), _l2_rate),
    Derivation("l2_lookup_bytes_per_cycle", ("loaded",), _l2_lookup_rate),
    Derivation("l2_sharing", ("loaded",), _l2_sharing, 2),
    Derivation("l2_queue_cycles", ("loaded",), _queue("hit", "hit L2")),
    Derivation("hbm_queue_cycles", ("loaded",), _queue("miss", "miss L2")),
    Derivation("l2_bytes_per_cycle_per_sm", ("memory",), _l2_rate_of_one, 1),
    Derivation("l2_hit_latency_cycles", ("memory",), _l2_latency),
    Derivation("tma_latency_cycles", ("memory",), _tma_latency),
    Derivation("tma_store_bytes_per_cycle", ("memory",), _tma_store_rate, 1),
    Derivation("tma_store_latency_cycles", ("memory",), _tma_store_latency),
    Derivation("add_bytes_per_cycle_per_sm", ("reduce_add",), _add_rate_of_one, 1),
    Derivation("l2_add_bytes_per_cycle", ("reduce_add",), _add_rate),
    Derivation("tma_issue_cycles", ("memory",), _tma_issue),
)
