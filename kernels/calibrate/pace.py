"""Warpgroups beside each other, GEMM - softmax - GEMM without memory: cycles a block, alignment, and spread over the SMs.

`python -m kernels.calibrate.pace --out DIR` writes `DIR/pace.json`. One block of a warpgroup: S (64 x n) from shared memory,
running softmax, O (64 x d) += P V with P in registers. Orders: `plain` waits for each GEMM, `pingpong` hands the tensor cores on
by named barriers, `two_stage`, `both` and `three_stage` overlap them with softmax. `ring`: with the mbarriers of two K and two V
buffers, filled by a warp that copies nothing. `alone`: one warpgroup, its parts stamped in one block of 32. `fed`: the buffers are
filled by TMA, out of L2 or of HBM, all SMs reading the same tiles.
"""

import numpy as np

from .harness import HERE, SM_COUNT_H200, Module, parse_out, spread, tensor_map_2d, write
from .ptx import PRELUDE, wgmma_wrappers

ORDERS = ("plain", "pingpong", "two_stage", "both", "three_stage")
TILES = {64: (96, 3), 128: (128, 2), 256: (64, 2)}
"""Head dimension: (keys of a block, warpgroups)."""
THREE_STAGE_KEYS = {64: 64, 128: 96, 256: 48}
STAMPS, SLOTS = 1024, 32
BLOCKS, RUNS = 1000, 4
LONG_BLOCKS, LONG_SHIFT = 32768, 6
FED_ROWS = {"l2": 8192, "hbm": 1 << 22}
"""Rows of 128 bytes that the SMs walk through again and again: 1 MiB and 512 MiB."""
OVERLAPPED = ("two_stage", "both", "three_stage")
START, SCORES_ARRIVED, SCORES_FENCED, SCORES_STEP, VALUES_ARRIVED, VALUES_FENCED, VALUES_STEP = 0, 1, 2, 3, 19, 20, 21
SCORES_DONE, SOFTMAX_DONE, VALUES_DONE = 29, 30, 31


def tile(order, d):
    """(keys of a block, warpgroups) of an order at head dimension d."""
    n, groups = TILES[d]
    return (THREE_STAGE_KEYS[d] if order == "three_stage" else n), groups


def name_of(order, d, ring, level="blocks", fenced=True, alone=False):
    """The kernel of a case, such as `plain_d64_ring`."""
    return f"{order}_d{d}" + "_ring" * ring + f"_{level}" * (level != "blocks") + "_unfenced" * (not fenced) + "_alone" * alone


CASES = [
    (order, d, ring, level, True) for order in ORDERS for d in TILES for ring in (False, True) for level in ("blocks", "steps")
]
CASES += [(order, d, True, "parts", True) for order in ORDERS for d in TILES]
CASES += [(order, d, True, level, False) for order in OVERLAPPED for d in TILES for level in ("blocks", "parts")]
ALONE = [(order, d, ring, level) for order in ("plain", "two_stage", "three_stage") for d in TILES for ring in (False, True)
         for level in ("blocks", "sparse")]  # fmt: skip


def source():
    """The whole CUDA source."""
    widths = {w for order, d, *_ in CASES for w in (d, tile(order, d)[0])}
    parts = [(HERE / part).read_text() for part in ("softmax.cuh", "pace.cu")]
    lines = []
    for order, d, ring, level, fenced in CASES:
        n, groups = tile(order, d)
        kinds = f"{int(ring)}, {level.upper()}, {int(fenced)}"
        lines.append(f"PACE({name_of(order, d, ring, level, fenced)}, {order.upper()}, {d}, {n}, {groups}, {kinds})\n")
    for order, d, ring, level in ALONE:
        name = name_of(order, d, ring, level, alone=True)
        lines.append(f"PACE({name}, {order.upper()}, {d}, {tile(order, d)[0]}, 1, {int(ring)}, {level.upper()}, 1)\n")
    return PRELUDE + wgmma_wrappers(widths) + "".join(parts) + "".join(lines)


class Pace:
    """Launches a case and returns its stamps, int64 (SM, warpgroup, stamp)."""

    def __init__(self, module):
        self.module = module

    def __call__(self, order, d, ring, level="blocks", fenced=True, blocks=BLOCKS, shift=0, delays=(0, 0), alone=False, fed=None):
        import torch

        n, groups = tile(order, d)
        groups = 1 if alone else groups
        bits = int(np.float32(1.4427 / d**0.5).view(np.uint32))
        out = torch.zeros((SM_COUNT_H200, groups, STAMPS), dtype=torch.int32, device="cuda")
        source = (0, 0) if fed is None else (tensor_map_2d(fed, n, 64), len(fed))
        args = [out, blocks, shift, *delays, 0, bits, *source]
        smem = groups * 64 * d * 2 + 4 * n * d * 2 + 64 + groups * STAMPS * 4
        self.module.launch(name_of(order, d, ring, level, fenced, alone), SM_COUNT_H200, (groups + 1) * 128, args, smem)
        torch.cuda.synchronize()
        seen = out.cpu().numpy().astype(np.int64) & 0xFFFFFFFF
        return seen if level != "blocks" else seen[:, :, 1 : blocks >> shift]  # overlapping orders have no block 0 in their loop


def unwrapped(stamps):
    """Stamps of a 32-bit clock as cycles since the first block of the SM's first warpgroup."""
    steps = np.diff(stamps, axis=2) & 0xFFFFFFFF
    first = (stamps[:, :, :1] - stamps[:, :1, :1] + (1 << 31) & 0xFFFFFFFF) - (1 << 31)
    return np.concatenate([first, first + np.cumsum(steps, axis=2)], axis=2)


def pace_of(times):
    """Cycles a block of each SM's first warpgroup over the last three quarters of a run."""
    skip = times.shape[2] // 4
    return (times[:, 0, -1] - times[:, 0, skip]) / (times.shape[2] - 1 - skip)


def phases(times, period):
    """How far each later warpgroup is behind the first, as a share of the period in [0, 1), (SM, warpgroup - 1, block)."""
    blocks = times.shape[2]
    behind = np.empty((times.shape[0], times.shape[1] - 1, blocks))
    for sm in range(times.shape[0]):
        for group in range(1, times.shape[1]):
            last = np.clip(np.searchsorted(times[sm, 0], times[sm, group], side="right") - 1, 0, blocks - 1)
            behind[sm, group - 1] = (times[sm, group] - times[sm, 0, last]) / period[sm]
    return behind % 1.0


def settled(behind):
    """The block from which an SM's phases stay within 0.06 of the mean of its last quarter (per SM; all blocks if never)."""
    turn = np.exp(2j * np.pi * behind)
    last = turn[..., -behind.shape[2] // 4 :].mean(axis=2, keepdims=True)
    off = np.abs(np.angle(turn * np.conj(last))).max(axis=1) / (2 * np.pi)
    far = off > 0.06
    return np.where(far.any(axis=1), behind.shape[2] - np.argmax(far[:, ::-1], axis=1), 0)


def histogram(behind, bins=20):
    """Share of the last quarter's blocks, over all SMs, by phase: `bins` numbers per later warpgroup."""
    tail = behind[..., -behind.shape[2] // 4 :]
    return [np.round(np.histogram(tail[:, g], bins, (0, 1))[0] / tail[:, g].size, 3).tolist() for g in range(tail.shape[1])]


def alignment(run, order, d, ring, fenced, period=None):
    """Started together and at parts of a period: cycles a block over SMs and launches, phase over time, when it settles."""
    groups = tile(order, d)[1]
    parts = {"0": (0, 0), "1/4": (0.25, 0.5), "1/2": (0.5, 0.5), "1/8": (0.125, 0.25)}
    if groups == 3:
        parts |= {"1/3": (1 / 3, 2 / 3), "2/3": (2 / 3, 1 / 3)}
    found = {}
    for part, shares in parts.items():
        runs = []
        for _ in range(RUNS):
            delays = [round(s * (period or 0)) for s in shares]
            times = unwrapped(run(order, d, ring, fenced=fenced, delays=delays))
            if period is None:
                period = float(np.median(pace_of(times)))
            runs.append(times)
        times = np.concatenate(runs)
        cycles = pace_of(times)
        behind = phases(times, cycles)
        at = [b for b in (0, 1, 3, 7, 15, 31, 63, 127, 255, 511, 990) if b < behind.shape[2]]
        found[part] = {
            "delays": delays,
            "cycles_per_block": spread(cycles),
            "cycles_per_block_deciles": np.round(np.percentile(cycles, range(0, 101, 10)), 1).tolist(),
            "phase_at_block": {str(b): np.round(np.median(behind[:, :, b], axis=0), 3).tolist() for b in at},
            "phase_histogram": histogram(behind),
            "settled_at_block": spread(settled(behind)),
            "first_sm_phases": np.round(behind[0, :, :: max(1, behind.shape[2] // 32)], 3).tolist(),
        }
    return found


def drift(run, order, d, ring):
    """How SMs drift apart over a long run: standard deviation of their totals after N blocks, and of each stretch."""
    times = unwrapped(run(order, d, ring, blocks=LONG_BLOCKS, shift=LONG_SHIFT))[:, 0]
    total = times - times[:, :1]
    steps = 1 << LONG_SHIFT
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 510) if n < total.shape[1]]
    spread_of = {str(n * steps): round(float(np.std(total[:, n])), 1) for n in counts}
    stretch = {str(n * steps): round(float(np.mean(np.std(total[:, n::n] - total[:, :-n:n], axis=0))), 1) for n in counts[:-1]}
    halves = np.corrcoef(total[:, 255], total[:, -1] - total[:, 255])[0, 1]
    lag = []
    for n in (1, 4, 16, 64):
        parts = np.diff(total[:, ::n], axis=1)
        parts = parts - parts.mean(axis=0)
        lag.append(round(float(np.corrcoef(parts[:, :-1].ravel(), parts[:, 1:].ravel())[0, 1]), 3))
    return {
        "cycles_per_block": spread(total[:, -1] / ((total.shape[1] - 1) * steps)),
        "std_of_total_after_blocks": spread_of,
        "mean_std_of_a_stretch_of_blocks": stretch,
        "correlation_of_the_two_halves": round(float(halves), 3),
        "correlation_of_neighbouring_stretches": dict(zip(("64", "256", "1024", "4096"), lag, strict=True)),
        "cycles_per_block_by_sm": np.round(total[:, -1] / ((total.shape[1] - 1) * steps), 2).tolist(),
    }


def timeline(run, order, d, ring, level, fenced=True):
    """Cycles from each stamp to the next (median, p05, p95, by warpgroup) in the last 31 blocks; the first SM's own of four."""
    (n, groups), kept = tile(order, d), STAMPS // SLOTS
    stamps = run(order, d, ring, level, fenced).reshape(SM_COUNT_H200, groups, kept, SLOTS)
    stamps = np.roll(stamps, -((BLOCKS + (order in OVERLAPPED)) % kept), axis=2)  # oldest first
    scores = [SCORES_ARRIVED, SCORES_FENCED, *range(SCORES_STEP, SCORES_STEP + d // 16)]
    values = [VALUES_ARRIVED, VALUES_FENCED, *range(VALUES_STEP, VALUES_STEP + n // 16)]
    if level == "parts":
        scores, values = scores[-1:], values[-1:]
    named = {VALUES_ARRIVED: "V arrived", VALUES_FENCED: "PV fenced", SCORES_ARRIVED: "K arrived", SCORES_FENCED: "S fenced"}
    named |= {values[-1]: "PV issued", scores[-1]: "S issued", START: "start"}
    named |= {SCORES_DONE: "S there", SOFTMAX_DONE: "softmax done", VALUES_DONE: "PV there"}
    if order in ("plain", "pingpong"):
        slots = [START, *scores, SCORES_DONE, SOFTMAX_DONE, *values, VALUES_DONE]
    elif order == "three_stage":
        slots = [START, *values, *scores, SOFTMAX_DONE, VALUES_DONE, SCORES_DONE]
    else:
        slots = [START, *scores, *values, SCORES_DONE, SOFTMAX_DONE, VALUES_DONE]
    taken = stamps[..., slots]
    flat = unwrapped(taken.reshape(SM_COUNT_H200, groups, -1)).reshape(taken.shape)[:, :, 1:]
    after = np.diff(flat.reshape(SM_COUNT_H200, groups, -1), axis=2)
    count = len(slots)
    steps = [after[:, :, i::count] for i in range(count)]
    names = [named.get(slot, "") for slot in slots]
    return {
        "stamps": names,
        "period": round(float(np.median(flat[:, :, 1:, 0] - flat[:, :, :-1, 0])), 1),
        "cycles_to_next": [[np.percentile(step[:, g], (50, 5, 95)).round(1).tolist() for step in steps] for g in range(groups)],
        "first_sm": (flat[0, :, :4] - flat[0, 0, 0, 0]).tolist(),
    }


def alone(run, order, d, ring):
    """One warpgroup: cycles a block, and from each stamp to the next (medians) where one block in 32 has stamps."""
    cycles = pace_of(unwrapped(run(order, d, ring, alone=True)))
    stamps = run(order, d, ring, "sparse", alone=True).reshape(SM_COUNT_H200, STAMPS // SLOTS, SLOTS)[:, 4:30]
    scores, values = SCORES_STEP + d // 16 - 1, VALUES_STEP + tile(order, d)[0] // 16 - 1
    slots = {
        "plain": (START, SCORES_ARRIVED, scores, SCORES_DONE, SOFTMAX_DONE, VALUES_ARRIVED, values, VALUES_DONE),
        "two_stage": (START, SCORES_ARRIVED, scores, VALUES_ARRIVED, values, SCORES_DONE, SOFTMAX_DONE, VALUES_DONE),
        "three_stage": (START, VALUES_ARRIVED, values, SCORES_ARRIVED, scores, SOFTMAX_DONE, VALUES_DONE, SCORES_DONE),
    }[order]
    names = {START: "start", SCORES_ARRIVED: "K arrived", scores: "S issued", VALUES_ARRIVED: "V arrived", values: "PV issued"}
    names |= {SCORES_DONE: "S there", SOFTMAX_DONE: "softmax done", VALUES_DONE: "PV there"}
    after = np.diff(stamps[..., slots], axis=2) & 0xFFFFFFFF
    stamped = np.median((stamps[:, 1:, START] - stamps[:, :-1, START]) & 0xFFFFFFFF) / 32
    return {
        "cycles_per_block": spread(cycles),
        "cycles_per_block_with_stamps": round(float(stamped), 2),
        "stamps": [names[slot] for slot in slots],
        "cycles_to_next": np.median(after, axis=(0, 1)).tolist(),
    }


def fed(run, order, d):
    """Cycles a block of all warpgroups, started together, with TMA for a feeder."""
    import torch

    found = {}
    for place, rows in FED_ROWS.items():
        matrix = torch.zeros((rows, 64), dtype=torch.float16, device="cuda").normal_()
        run(order, d, True, fed=matrix)
        found[place] = spread(pace_of(unwrapped(run(order, d, True, fed=matrix))))
    return found


def main():
    """Run every case and write the result."""
    out = parse_out(__doc__)
    text = source()
    module = Module(text)
    run = Pace(module)
    results = {"local_bytes": {name_of(*case): module.registers(name_of(*case))[1] for case in CASES}}
    for part in ("alignment", "drift", "timeline", "alone", "fed"):
        results[part] = {}
    for d in TILES:
        for case in CASES:
            order, width, ring, level, fenced = case
            if width != d:
                continue
            if level != "blocks":
                results["timeline"][name_of(*case)] = timeline(run, order, d, ring, level, fenced)
                continue
            results["alignment"][name_of(*case)] = alignment(run, order, d, ring, fenced)
            if order in ("plain", "pingpong"):
                results["drift"][name_of(*case)] = drift(run, order, d, ring)
    for order, d, ring, level in ALONE:
        if level == "blocks":
            results["alone"][name_of(order, d, ring)] = alone(run, order, d, ring)
    for order in ORDERS:
        for d in TILES:
            results["fed"][name_of(order, d, True)] = fed(run, order, d)
    write(out, "pace", "kernels/calibrate/pace.py", text, results)


if __name__ == "__main__":
    main()
