"""How each calibrated field of a device file follows from the recordings: one formula each, listed in `DERIVATIONS`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist, mean, median

from . import gemm_issue, power_fit


@dataclass(frozen=True)
class Found:
    """What a recording says of a field: the value, the lowest and highest that were seen, and how it was found."""

    value: float
    low: float
    high: float
    how: str


@dataclass(frozen=True)
class Derivation:
    """A field of the device file, the recordings it takes, its formula and the digits it is given with."""

    field: str
    recordings: tuple[str, ...]
    formula: Callable[..., Found]
    digits: int = 0


def _one(sample: Mapping, how: str) -> Found:
    """The median of a sample with its 5th and 95th percentile."""
    return Found(sample["median"], sample["p05"], sample["p95"], how)


def _hbm_efficiency(memory: dict) -> Found:
    rate = {name: entry["bytes_per_s"] / 4.8e12 for name, entry in memory["hbm"].items()}
    best = {kind: max(value for name, value in rate.items() if name.startswith(kind)) for kind in ("read", "write", "copy")}
    how = "the best write loop over the datasheet's 4.8 TB/s, between the best copy and the best read"
    return Found(best["write"], best["copy"], best["read"], how)


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
    return _one(memory["load_latency"]["hbm_same_2mib_pages"], "plain load that misses L2")


def _l2_latency(memory: dict) -> Found:
    return _one(memory["load_latency"]["l2_hit_all_sms"], "plain load that hits, over SMs and lines")


def _tma_latency(memory: dict) -> Found:
    fit, plain = memory["tma_latency"]["fit_cycles_over_bytes"]["l2_hit"], memory["load_latency"]["l2_hit_all_sms"]["median"]
    value, off = fit["intercept"] - plain, fit["worst_residual"]
    how = f"TMA that hits L2 takes {fit['intercept']:.0f} at no bytes, a plain load {plain:.0f}"
    return Found(value, value - off, value + off, how)


def _mma_sync(mma: dict) -> Found:
    beside, alone = mma["issue_cycles"]["mma"], mma["fits"]["cycles_per_mma_by_accumulators"]["chains8"]
    how = f"m16n8k16 takes {beside} cycles of its sub-partition beside arithmetic, 4 at the peak"
    return Found(4 / beside, *sorted((4 / beside, 4 / alone)), how)


def _ldmatrix(mma: dict) -> Found:
    worst = mma["issue_cycles"]["worst_residual"]
    value = mma["issue_cycles"]["ldmatrix"]
    how = f"with the mma.sync the elapsed time of {mma['issue_cycles']['cases']} pairings of GEMM and softmax, worst {worst:.1%}"
    return Found(value, value, value, how)


def _wgmma_issue(pace: dict) -> Found:
    start, _, _, missed = gemm_issue.fit(pace["alone"])
    off = max(map(abs, missed))
    how = f"issue of {len(missed)} GEMMs of up to six k steps by one warpgroup alone, less stamps: within {off:.0f} cycles"
    return Found(start, start, start, how)


def _wgmma_step(pace: dict) -> Found:
    least = gemm_issue.fit(pace["alone"])[1]
    return Found(least, least, least, "the same GEMMs: a k step, at least")


def _wgmma_step_share(pace: dict) -> Found:
    share = gemm_issue.fit(pace["alone"])[2]
    return Found(share, share, share, "the same GEMMs: a k step, of its cycles on the tensor cores")


def _wgmma_latency(pace: dict) -> Found:
    start = _wgmma_issue(pace).value
    gemms = [gemm for gemm in gemm_issue.gemms(pace["alone"]) if gemm.returned]
    later = [gemm.returned - gemm.steps * gemm.each - start for gemm in gemms]
    how = f"{len(later)} GEMMs of one warpgroup return so much later than start and k steps, less stamps"
    return Found(mean(later), min(later), max(later), how)


def _stamped_latency(tensor: dict) -> float:
    """From the last k step to a lone GEMM's return, with the stamps of tensor_cores."""
    fits = [fit["intercept"] for name, fit in tensor["solo_fit_cycles_per_k16_step"].items() if name.startswith("ss")]
    issue = tensor["solo_issue"]["ss_n176_k8"]
    return mean(fits) - (issue["issued"][0] - issue["start"])


def _wgmma_queue(tensor_cores: dict) -> Found:
    """Of long chains: k steps not begun when the warp that lags issues the last one, itself included."""
    waiting = []
    for name, row in tensor_cores["solo"].items():
        operands, width, steps = name.split("_")
        if operands == "ss" and int(steps[1:]) >= 16:
            each, count = int(width[1:]) / 2, int(steps[1:])
            begun_at = row["waited"]["median"] - count * each - _stamped_latency(tensor_cores)
            waiting.append(count - 1 - (row["committed"]["p95"] - begun_at) / each)
    how = f"chains of 16 and 32 k steps, {len(waiting)} of them: steps not begun when the last of the four warps issues the last"
    return Found(mean(waiting), min(waiting), max(waiting), how)


def _wgmma_arbitration(tensor: dict) -> Found:
    errors = {name: entry["to_24_steps"]["mean"] for name, entry in tensor["arbitration_error_cycles"].items()}
    if min(errors, key=errors.get) != "fifo_by_step":
        raise ValueError("k steps are not served in order of issue; the engine has no such arbitration by this value")
    shown = ", ".join(f"{name.replace('_', ' ')} {value:.0f}" for name, value in errors.items())
    return Found(0, 0, 0, f"mean error in cycles of two or three warpgroups' returns: {shown}")


def _copies(pipes_contended: dict, *names: str) -> list[float]:
    """Cycles of each pattern beside full tensor cores, with A in shared memory and in registers."""
    rows = pipes_contended["cycles_per_copy"]
    return [rows[name][f"cycles_busy_{a}"]["median"] for name in names for a in ("ss", "rs")]


def _issue_beside(pipes_contended: dict) -> Found:
    """What four FFMA add to an EX2, a quarter of it."""
    alone, with_four = (_copies(pipes_contended, name) for name in ("MUFU.EX2", "EX2+4FFMA"))
    each = [(longer - short) / 4 for short, longer in zip(alone, with_four, strict=True)]
    return Found(mean(each), min(each), max(each), "EX2 and four FFMA less EX2, of one warp beside full tensor cores, a quarter")


def _fma_beside(pipes_contended: dict) -> Found:
    each = _copies(pipes_contended, "FFMA", "FADD", "FMUL")
    return Found(mean(each), min(each), max(each), "FFMA, FADD, FMUL of one warp beside full tensor cores")


def _pipe_beside(*names: str) -> Callable[[dict], Found]:
    def formula(pipes_contended: dict) -> Found:
        issue = _issue_beside(pipes_contended).value
        each = [cycles - issue for cycles in _copies(pipes_contended, *names)]
        how = f"{', '.join(names)} of one warp beside full tensor cores, less the issue of an instruction"
        return Found(mean(each), min(each), max(each), how)

    return formula


def _register_share(pipes_contended: dict) -> Found:
    """What instructions leave, one a cycle at most, over what GEMMs keep of their rate."""
    rows, shares = pipes_contended["cycles_per_copy"], []
    for name in ("FFMA", "FADD", "FMUL"):
        for a in ("ss", "rs"):
            cycles, kept = (rows[name][f"{what}_busy_{a}"]["median"] for what in ("cycles", "tensor_utilisation"))
            shares.append((1 - 1 / cycles) / kept)
    how = "FFMA, FADD, FMUL of one warp: the issue slots that they leave over the rate that GEMMs keep beside them"
    return Found(mean(shares), min(shares), max(shares), how)


def _beside_exp(contention: dict) -> Found:
    cases = {name: list(case["cycles_per_unit"].values()) for name, case in contention["cases"].items()}
    later = []
    for gemm in ("qk", "pv"):
        alone = cases[f"n176_{gemm}"][0]["median"]
        later.append(cases[f"n176_{gemm}_exp"][0]["median"] - alone)
        later.append(cases[f"n176_exp_{gemm}"][1]["median"] - alone)
    how = f"a GEMM with its wait lasts longer beside EX2 and FFMA alone, mean of {len(later)} pairings"
    return Found(mean(later), min(later), max(later), how)


def _store_beside(*kinds: str) -> Callable[[dict], Found]:
    """Bytes a cycle of 16-byte stores of a warpgroup beside GEMM streams of these kinds."""

    def formula(reduce_add: dict) -> Found:
        rates = [reduce_add["beside"][f"{kind}_stores"]["stores_bytes_per_clk"]["median"] for kind in kinds]
        return Found(mean(rates), min(rates), max(rates), f"16-byte stores of a warpgroup beside GEMMs {', '.join(kinds)}, mean")

    return formula


def _store_interference(reduce_add: dict) -> Found:
    rate = {name: found["gemms_per_1000_clk"]["median"] for name, found in reduce_add["beside"].items()}
    lost = [1 - rate[f"{kind}_stores"] / rate[f"{kind}_alone"] for kind in ("ss64", "ss80")]
    how = "rate that WGMMA of 64 and 80 columns, A in shared memory, loses beside 16-byte stores of a warpgroup, mean"
    return Found(mean(lost), min(lost), max(lost), how)


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


def _red_interference(reduce_add: dict) -> Found:
    kinds = sorted({name.split("_")[0] for name in reduce_add["beside"]})
    rate = {name: found["gemms_per_1000_clk"]["median"] for name, found in reduce_add["beside"].items()}
    lost = [1 - rate[f"{kind}_reds"] / rate[f"{kind}_alone"] for kind in kinds]
    how = f"rate that WGMMA loses while a warpgroup adds from registers (red.global.v4.f32), mean of {len(lost)} GEMMs"
    return Found(mean(lost), min(lost), max(lost), how)


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


def _chain(formula: Callable[[Mapping[str, float]], float], how: str) -> Callable[[dict], Found]:
    def found(chains: dict) -> Found:
        value = formula(chains["cycles"])
        return Found(value, value, value, how)

    return found


def _draw(chains: dict) -> Found:
    return _one(chains["draw_cycles"]["alone"], "one CTA alone, over the SMs")


def _cold(fetch: dict, at: str) -> tuple[float, float]:
    """(first wait, cycles an instruction beyond its own) of a straight run behind `at` of other code, one warpgroup."""
    cycles = dict(zip(fetch["instructions"], fetch["cases"]["one_warpgroup"][at]["cycles"][0], strict=True))
    return cycles[64] - cycles[32] - 32, (cycles[2048] - cycles[128]) / (2048 - 128) - 1


def _fetch(number: int, how: str) -> Callable[[dict], Found]:
    def found(fetch: dict) -> Found:
        near = [_cold(fetch, f"{kib}KiB")[number] for kib in (8, 16, 32, 64)]
        return Found(median(near), min(near), max(near), f"{how}; {_cold(fetch, '192KiB')[number]:.1f} behind 192 KiB, out of L2")

    return found


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


def _mbarrier_issue(launch: dict) -> Found:
    return _one(launch["barriers"]["mbarrier_arrive_cycles"], "a warp's arrivals one behind the other")


_mbarrier_wait = _chain(
    lambda c: c["barrier_ready"] - c["compare_branch"] + c["multiply"], "try_wait on a completed phase and branch, less the branch"
)


def _mbarrier_arrive(launch: dict, chains: dict) -> Found:
    hand_off, wait = launch["barriers"]["mbarrier_handoff_cycles"], _mbarrier_wait(chains).value
    how = f"a hand-off between two warps takes {hand_off['median']:.0f}, less the {wait:.0f} of a wait"
    return Found(hand_off["median"] - wait, hand_off["p05"] - wait, hand_off["p95"] - wait, how)


def _named_barrier(launch: dict) -> Found:
    sample = launch["barriers"]["named_barrier_handoff_cycles"]
    how = f"half of a hand-off between two warpgroups, {sample['median']:.1f}: half is the arrival, half the wait"
    return Found(sample["median"] / 2, sample["p05"] / 2, sample["p95"] / 2, how)


def _tma_issue(memory: dict) -> Found:
    return _one(memory["tma_latency"]["loads"]["rows_128"]["issue"], "issue of one load")


def _kernel_launch(launch: dict) -> Found:
    sample = launch["launch_overhead"]["empty_132x384_200kb"]["single_us"]
    low, value, high = (sample[name] * 1980 for name in ("p05", "median", "p95"))
    how = f"an empty kernel of 132 CTAs with 200 KB takes {sample['median']} us between two events, at 1.98 GHz"
    return Found(value, low, high, how)


def _cta_launch(launch: dict) -> Found:
    how = "from the end of a CTA with 200 KB to the start of the next on its SM"
    return _one(launch["cta_succession"]["cta_stamps_200kb"]["gap_cycles"], how)


def _setup(memory: dict, launch: dict) -> Found:
    first = memory["tma_latency"]["descriptor"]["first_use"]
    use = first["first_tile_cycles"]["median"] - first["later_tile_cycles"]["median"]
    meet = launch["barriers"]["bar_sync_384_threads_cycles"]["median"]
    how = f"first use of a descriptor adds {use:.0f} to a load, a CTA-wide barrier takes {meet:.0f}"
    return Found(use + meet, use + meet, use + meet, how)


def _droop(power: dict) -> Found:
    shares, _ = power_fit.droop(power["workloads"])
    how = f"GEMMs at the power limit run below the clock that NVML says was asked for, median of {len(shares)}"
    return Found(median(shares), min(shares), max(shares), how)


def _droop_activity(power: dict) -> Found:
    _, activity = power_fit.droop(power["workloads"])
    return Found(activity, activity, activity, "fits the GEMMs below the power limit, at 7 to 46 % tensor activity")


def _power_term(term: str, what: str, unit: float = 1.0) -> Callable[[dict], Found]:
    """One energy of the fit over all workloads, with its range when each workload in turn is left out."""

    def formula(power: dict) -> Found:
        found, without = power_fit.fit(power["workloads"]), power_fit.spread(power["workloads"])
        low, high = (side(each.terms[term] for each in without) for side in (min, max))
        how = f"least squares over {len(found.errors)} workloads, rms {found.rms:.1%}: {what}"
        if unit == 1.0:
            return Found(found.terms[term], low, high, how)
        value = found.terms[term]
        return Found(value, value, value, f"{how}; {low / unit:.1f} to {high / unit:.1f} pJ/B with any one left out")

    return formula


def _bf16_ratio(power: dict) -> Found:
    found, without = power_fit.fit(power["workloads"]), power_fit.spread(power["workloads"])
    ratios = [each.terms["bf16"] / each.terms["tensor"] for each in without]
    return Found(found.terms["bf16"] / found.terms["tensor"], min(ratios), max(ratios), "the same fit: bf16 tiles over fp16")


def _voltage_floor(power: dict) -> Found:
    found = power_fit.fit(power["workloads"])
    near = [floor / 100 for floor in range(96) if power_fit.fit(power["workloads"], floor=floor / 100).rms < 1.1 * found.rms]
    how = f"the same fit: the least rms, {found.rms:.1%}, within a tenth of it in the range"
    return Found(found.floor, min(near), max(near), how)


def _overshoot(power: dict) -> Found:
    ratios = [watts / power["power_limit_watts"] for watts in power_fit.limited(power["workloads"])]
    how = f"watts of {len(ratios)} GEMM streams at the limit over the limit, 0.5 to 1.5 s into the load, median"
    return Found(median(ratios), min(ratios), max(ratios), how)


def _burst_power(power: dict) -> Found:
    workloads = power["workloads"]
    shares, _ = power_fit.droop(workloads)
    needed = power_fit.bursts(workloads, power_fit.fit(workloads), median(shares))
    how = f"first 30 ms of {len(needed)} GEMM streams: half of the excess over it, in logarithms, is given up"
    return Found(median(needed), min(needed), max(needed), how)


def _idle(power: dict) -> Found:
    watts = power["workloads"]["sleep"]["watts_instant_settled"]
    return Found(watts, watts, watts, "a kernel that sleeps")


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
    Derivation("red_interference", ("reduce_add",), _red_interference, 2),
    Derivation("mma_sync_efficiency", ("mma_sync",), _mma_sync, 4),
    Derivation("ldmatrix_issue_cycles", ("mma_sync",), _ldmatrix, 3),
    Derivation("wgmma_issue_cycles", ("pace",), _wgmma_issue),
    Derivation("wgmma_beside_cycles", ("contention",), _beside_exp),
    Derivation("wgmma_step_issue_cycles", ("pace",), _wgmma_step),
    Derivation("wgmma_step_issue_share", ("pace",), _wgmma_step_share, 2),
    Derivation("wgmma_latency_cycles", ("pace",), _wgmma_latency),
    Derivation("wgmma_queue_ksteps", ("tensor_cores",), _wgmma_queue),
    Derivation("wgmma_arbitration_ksteps", ("tensor_cores",), _wgmma_arbitration),
    Derivation("store_beside_most", ("reduce_add",), _store_beside("rs64", "rs128", "ss176")),
    Derivation("store_beside_least", ("reduce_add",), _store_beside("ss64", "ss80")),
    Derivation("store_interference", ("reduce_add",), _store_interference, 2),
    Derivation("wgmma_register_share", ("pipes_contended",), _register_share, 2),
    Derivation("fma_cycles", ("pipes",), _pipe("FFMA", "FADD", "FMUL")),
    Derivation("alu_cycles", ("pipes",), _pipe("FMNMX")),
    Derivation("mufu_cycles", ("pipes",), _pipe("MUFU.EX2")),
    Derivation("mufu_spacing_cycles", ("softmax",), _mufu_spacing),
    Derivation("convert_cycles", ("pipes",), _pipe("F2FP")),
    Derivation("issue_beside_wgmma_cycles", ("pipes_contended",), _issue_beside, 2),
    Derivation("fma_beside_wgmma_cycles", ("pipes_contended",), _fma_beside, 2),
    Derivation("alu_beside_wgmma_cycles", ("pipes_contended",), _pipe_beside("FMNMX", "F2FP"), 2),
    Derivation("mufu_beside_wgmma_cycles", ("pipes_contended",), _pipe_beside("MUFU.EX2"), 2),
    Derivation("dependent_latency_cycles", ("pipes",), _latency("FFMA", "FADD", "FMNMX", "F2FP")),
    Derivation("shuffle_latency_cycles", ("pipes",), _latency("SHFL.BFLY")),
    Derivation("mufu_latency_cycles", ("pipes",), _latency("MUFU.EX2")),
    Derivation("vote_cycles", ("chains",), _chain(lambda c: c["vote_branch"] - c["multiply"], "dependent ISETP, VOTE and BRA")),
    Derivation("divide_cycles", ("chains",), _chain(lambda c: c["divide"], "dependent 32-bit divisions of one warp")),
    Derivation("branch_cycles", ("branches",), _branch),
    Derivation("branch_beside_cycles", ("branches",), _branch_beside),
    Derivation("chain_dilation", ("branches",), _chain_dilation, 2),
    Derivation("fetch_cycles", ("fetch",), _fetch(1, "straight run of FFMA behind 8 to 64 KiB of other code, an instruction"), 2),
    Derivation("fetch_latency_cycles", ("fetch",), _fetch(0, "the same runs, cycles lost between instructions 32 and 64")),
    Derivation("mbarrier_arrive_cycles", ("launch", "chains"), _mbarrier_arrive),
    Derivation("mbarrier_issue_cycles", ("launch",), _mbarrier_issue),
    Derivation("mbarrier_wait_cycles", ("chains",), _mbarrier_wait),
    Derivation("draw_latency_cycles", ("chains",), _draw),
    Derivation("named_barrier_cycles", ("launch",), _named_barrier),
    Derivation("tma_issue_cycles", ("memory",), _tma_issue),
    Derivation("kernel_launch_cycles", ("launch",), _kernel_launch),
    Derivation("cta_launch_cycles", ("launch",), _cta_launch),
    Derivation("setup_cycles", ("memory", "launch"), _setup),
    Derivation("tensor_clock_droop", ("power",), _droop, 3),
    Derivation("tensor_droop_activity", ("power",), _droop_activity, 2),
    Derivation("power_limit_overshoot", ("power",), _overshoot, 3),
    Derivation("burst_w", ("power",), _burst_power),
    Derivation("idle_w", ("power",), _idle, 1),
    Derivation("tensor_w", ("power",), _power_term("tensor", "GEMMs of fp16 tiles that are new every time")),
    Derivation("tensor_bf16_ratio", ("power",), _bf16_ratio, 3),
    Derivation("issue_w", ("power",), _power_term("issue", "softmax without exp2")),
    Derivation("mufu_w", ("power",), _power_term("mufu", "softmax and its exp2 alone, less issue")),
    Derivation("smem_w", ("power",), _power_term("smem", "16-byte reads with their registers; part of WGMMA's operands")),
    Derivation("l2_joules_per_byte", ("power",), _power_term("l2", "TMA of tiles, with or without GEMMs", 1e-12), 13),
    Derivation("l2_lookup_joules_per_byte", ("power",), _power_term("l2_lookup", "the same, SMs in step or apart", 1e-12), 13),
    Derivation("hbm_joules_per_byte", ("power",), _power_term("hbm", "TMA of 2 GiB, and a copy, less L2", 1e-12), 13),
    Derivation("voltage_floor", ("power",), _voltage_floor, 2),
)
