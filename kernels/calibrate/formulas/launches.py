"""Barriers, and what comes before a kernel's first instruction."""

from __future__ import annotations

from .found import Derivation, Found, one
from .pipes import chain


def _mbarrier_issue(launch: dict) -> Found:
    return one(launch["barriers"]["mbarrier_arrive_cycles"], "a warp's arrivals one behind the other")


_mbarrier_wait = chain(
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


def _kernel_launch(counted: dict) -> Found:
    return one(counted["132_ctas"], "an empty kernel of 132 CTAs of 384 threads, under counters and behind emptied caches")


def _kernel_train(launch: dict) -> Found:
    sample = launch["launch_overhead"]["empty_132x384_200kb"]["per_kernel_of_a_train_us"]
    low, value, high = (sample[name] * 1980 for name in ("p05", "median", "p95"))
    how = f"each of a train of empty kernels of 132 CTAs with 200 KB takes {sample['median']} us, at 1.98 GHz"
    return Found(value, low, high, how)


def _cta_launch(launch: dict) -> Found:
    how = "from the end of a CTA with 200 KB to the start of the next on its SM"
    return one(launch["cta_succession"]["cta_stamps_200kb"]["gap_cycles"], how)


def _setup(memory: dict, launch: dict) -> Found:
    first = memory["tma_latency"]["descriptor"]["first_use"]
    use = first["first_tile_cycles"]["median"] - first["later_tile_cycles"]["median"]
    meet = launch["barriers"]["bar_sync_384_threads_cycles"]["median"]
    how = f"first use of a descriptor adds {use:.0f} to a load, a CTA-wide barrier takes {meet:.0f}"
    return Found(use + meet, use + meet, use + meet, how)


DERIVATIONS = (
    Derivation("mbarrier_arrive_cycles", ("launch", "chains"), _mbarrier_arrive),
    Derivation("mbarrier_issue_cycles", ("launch",), _mbarrier_issue),
    Derivation("mbarrier_wait_cycles", ("chains",), _mbarrier_wait),
    Derivation("named_barrier_cycles", ("launch",), _named_barrier),
    Derivation("kernel_launch_cycles", ("launch_counted",), _kernel_launch),
    Derivation("kernel_train_cycles", ("launch",), _kernel_train),
    Derivation("cta_launch_cycles", ("launch",), _cta_launch),
    Derivation("setup_cycles", ("memory", "launch"), _setup),
)
