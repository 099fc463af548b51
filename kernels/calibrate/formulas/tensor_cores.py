"""mma.sync, WGMMA, and what runs beside it."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

from .. import gemm_issue
from .found import Derivation, Found


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


STSM_BYTES = 4 * 512  # of four warps
SHARED, REGISTERS = "ss_n192", "rs_n128"  # GEMMs of e4m3 whose operands take 85 and 64 bytes a cycle of shared memory
SMEM_BYTES = 128  # a cycle


def _stsm_beside(fp8_rates: dict, pipes_contended: dict, gemms: str) -> float:
    """Bytes a cycle of STSM beside two warpgroups' e4m3 GEMMs, less the issue of an instruction."""
    cycles = fp8_rates["patterns"]["STSM"][f"beside_2_{gemms}"]["median"]
    return STSM_BYTES / (cycles - _issue_beside(pipes_contended).value)


def _matrix_most(fp8_rates: dict, pipes_contended: dict) -> Found:
    rate = _stsm_beside(fp8_rates, pipes_contended, REGISTERS)
    how = f"STSM of one warpgroup beside e4m3 GEMMs {REGISTERS}, whose operands take 64 B a cycle, less the issue of an instruction"
    return Found(rate, rate, rate, how)


def _matrix_more(fp8_rates: dict, pipes_contended: dict) -> Found:
    columns = 192
    taken = 32 * (64 + columns) / (columns / 2)  # by a k step: rows of 32 bytes of A and B
    more = _stsm_beside(fp8_rates, pipes_contended, SHARED) - (SMEM_BYTES - taken)
    how = f"STSM of one warpgroup beside e4m3 GEMMs {SHARED}, whose operands take {taken:.0f} B a cycle, less what those leave"
    return Found(more, more, more, how)


def _matrix_interference(fp8_rates: dict) -> Found:
    """What GEMMs lose beside STSM of what they keep beside EX2, which takes nothing of shared memory."""
    kept = fp8_rates["patterns"]
    places = [f"beside_2_{gemms}" for gemms in (SHARED, REGISTERS)]
    lost = [1 - kept["STSM"][place]["tensor_utilisation"] / kept["MUFU.EX2"][place]["tensor_utilisation"] for place in places]
    how = f"rate that e4m3 GEMMs {SHARED} and {REGISTERS} lose beside STSM of one warpgroup, mean"
    return Found(mean(lost), min(lost), max(lost), how)


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


_LOADED = {"ss64 ss64": "most", "ss64 rs128": "", "rs128 rs128": "least"}
"""Pairs of GEMMs beside which a warpgroup loads, and which end of their loss they are."""


def _load_beside(beside_stores: dict) -> Found:
    seen = [beside_stores["beside"][f"{pair}, LDS, none"]["cycles_per_copy"]["median"] for pair in _LOADED]
    return Found(mean(seen), min(seen), max(seen), "LDS.128 of one warpgroup beside GEMMs ss64, rs128 and both, mean")


def _load_interference(end: str):
    (pair,) = (pair for pair, which in _LOADED.items() if which == end)

    def formula(beside_stores: dict) -> Found:
        loaded, alone = (beside_stores["beside"][f"{pair}, {what}, none"]["tensor_utilisation"] for what in ("LDS", "none"))
        lost = sorted(1 - loaded[place] / alone["median"] for place in ("p95", "median", "p05"))
        return Found(lost[1], lost[0], lost[2], f"rate that GEMMs {pair.split()[0]} lose beside LDS.128 of one warpgroup")

    return formula


def _red_interference(reduce_add: dict) -> Found:
    kinds = sorted({name.split("_")[0] for name in reduce_add["beside"]})
    rate = {name: found["gemms_per_1000_clk"]["median"] for name, found in reduce_add["beside"].items()}
    lost = [1 - rate[f"{kind}_reds"] / rate[f"{kind}_alone"] for kind in kinds]
    how = f"rate that WGMMA loses while a warpgroup adds from registers (red.global.v4.f32), mean of {len(lost)} GEMMs"
    return Found(mean(lost), min(lost), max(lost), how)


DERIVATIONS = (
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
    Derivation("matrix_beside_most", ("fp8_rates", "pipes_contended"), _matrix_most),
    Derivation("matrix_beside_more", ("fp8_rates", "pipes_contended"), _matrix_more),
    Derivation("store_beside_most", ("reduce_add",), _store_beside("rs64", "rs128", "ss176")),
    Derivation("store_beside_least", ("reduce_add",), _store_beside("ss64", "ss80")),
    Derivation("store_interference", ("reduce_add",), _store_interference, 2),
    Derivation("load_beside_cycles", ("beside_stores",), _load_beside),
    Derivation("load_interference_least", ("beside_stores",), _load_interference("least"), 2),
    Derivation("load_interference_most", ("beside_stores",), _load_interference("most"), 2),
    Derivation("matrix_interference", ("fp8_rates",), _matrix_interference, 2),
    Derivation("wgmma_register_share", ("pipes_contended",), _register_share, 2),
    Derivation("issue_beside_wgmma_cycles", ("pipes_contended",), _issue_beside, 2),
    Derivation("fma_beside_wgmma_cycles", ("pipes_contended",), _fma_beside, 2),
    Derivation("alu_beside_wgmma_cycles", ("pipes_contended",), _pipe_beside("FMNMX", "F2FP"), 2),
    Derivation("mufu_beside_wgmma_cycles", ("pipes_contended",), _pipe_beside("MUFU.EX2"), 2),
)
