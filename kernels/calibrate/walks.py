"""Reads of HBM as few queries make them, and the clock beside mma.sync: `python -m kernels.calibrate.walks --out DIR`.

`rates`: how fast HBM is read by CTAs of a ring of 32 KiB slots, by how many CTAs there are, how many share an SM and how many slots
each has; with each case where the CTAs went and how unlike their times are. `clocks`: SM clock and power by how many mma.sync a
warp does on a block, with reads and without, on normal numbers and on tiles whose other rows are all 0 or 1.
Writes `DIR/walks.json` in about 20 s.
"""

import itertools
import statistics
import time

import numpy as np

from .harness import HERE, SM_COUNT_H200, Module, parse_out, spread, write
from .power import Board
from .ptx import PRELUDE

BLOCK_BYTES, THREADS = 32 << 10, 128
DATA_BYTES = 1 << 30
ALONE_BYTES = 117 << 10
"""Shared memory of which an SM has room for one."""
ROUNDS = 8
ALONE = tuple(itertools.product((2, 3, 4, 5, 6), (16, 48, 96, 120, 128, 132)))
"""(slots, CTAs) of rings that do not share an SM."""
SHARED = tuple(itertools.product((2, 3), (128, 160, 192, 256, 264, 384, 396, 528, 792)))
"""The same where as many share one as fit: three and two."""
STEPS = (0, 32)
MMA = (0, 4, 8, 16, 32, 64, 128)
LASTS = 1700
"""Cycles of a block where nothing is read: what it takes at HBM's rate."""
ROWS = {"normal": (16, 0.0), "quarter": (4, 0.0), "quarter and ones": (4, 1.0), "zeros": (0, 0.0)}
"""Rows of a tile that are normal numbers, and what the others hold: 0 as of queries that do not exist, 1 as their weights."""
SECONDS, SETTLED = 0.7, 0.35
TENSOR_CYCLES = 4
"""Of a sub-partition's tensor core for an m16n8k16 at its peak."""


def source():
    """The whole CUDA source."""
    return PRELUDE + (HERE / "walks.cu").read_text()


def fragments(rows, others):
    """The A operand of a tile of 16 rows of which so many are normal numbers and all others alike: 4 words of each thread."""
    import torch

    words = torch.randn(4, THREADS, 2, device="cuda").bfloat16()
    lane = torch.arange(THREADS, device="cuda") % 32
    for register in range(4):
        row = lane // 4 + 8 * (register % 2)
        words[register, row >= rows] = others
    return words.view(torch.int32).contiguous()


class Walks:
    """The data, and a launch."""

    def __init__(self):
        import torch

        self.torch, self.module = torch, Module(source())
        self.data = torch.randn(DATA_BYTES // 2, device="cuda", dtype=torch.bfloat16)
        self.operands = {name: fragments(*each) for name, each in ROWS.items()}
        self.keep = torch.zeros(THREADS, device="cuda")

    def launch(self, log, slots, ctas, blocks, steps, reads=True, alone=False, rows="normal"):
        """Enqueue one; log is (CTAs, 4) of int64."""
        smem = max(slots * BLOCK_BYTES, ALONE_BYTES if alone else 0)
        args = [log, self.keep, self.data, self.operands[rows], blocks, steps, int(reads), LASTS]
        self.module.launch(f"walk_{slots}", ctas, THREADS, args, smem)

    def rate(self, slots, ctas, steps, alone):
        """How long, where and how evenly, of ROUNDS launches."""
        blocks = DATA_BYTES // BLOCK_BYTES // ctas
        log = self.torch.zeros((ROUNDS + 1, ctas, 4), dtype=self.torch.int64, device="cuda")
        for number in range(ROUNDS + 1):
            self.launch(log[number], slots, ctas, blocks, steps, alone=alone)
        self.torch.cuda.synchronize()
        seen = log[1:].cpu().numpy().astype(np.float64)
        begin, end, cycles, sm = np.moveaxis(seen, 2, 0)
        lasts = end.max(axis=1) - begin.min(axis=1)
        first = begin < begin.min(axis=1, keepdims=True) + 5_000  # at work in the first 5 us
        shared = [np.bincount(sm[r][first[r]].astype(int), minlength=SM_COUNT_H200) for r in range(len(sm))]
        idle = 1.0 - (np.sort(end, axis=1) - begin.min(axis=1, keepdims=True)).mean(axis=1) / lasts
        return {
            "slots": slots, "ctas": ctas, "steps": steps, "alone": alone, "blocks": blocks,
            "tb_per_s": round(statistics.median(ctas * blocks * BLOCK_BYTES / lasts) / 1000, 3),
            "us": round(statistics.median(lasts) / 1000, 2),
            "cta_us": spread((end - begin) / 1000),
            "mhz": round(float(np.median(cycles / (end - begin))) * 1000, 1),
            "first_ctas_of_sms": np.bincount(shared[0], minlength=4).tolist(),  # SMs with 0, 1, 2, .. of them
            "ctas_of_sms": np.bincount(np.bincount(sm[0].astype(int), minlength=SM_COUNT_H200), minlength=4).tolist(),  # of all
            "ended_before_the_last": round(float(np.median(idle)), 4),  # mean over CTAs, of the launch
        }  # fmt: skip

    def clock(self, board, steps, reads, rows):
        """Clock at once and settled, watts settled, and the tensor cores' activity."""
        log = self.torch.zeros((20_000, SM_COUNT_H200, 4), dtype=self.torch.int64, device="cuda")
        blocks = DATA_BYTES // BLOCK_BYTES // SM_COUNT_H200
        self.launch(log[0], 3, SM_COUNT_H200, 1, steps, reads, True, rows)
        self.torch.cuda.synchronize()
        time.sleep(0.15)
        began, looks, queued, number = time.perf_counter(), [], [], 0
        while time.perf_counter() - began < SECONDS and number < len(log):
            for _ in range(20):
                self.launch(log[number], 3, SM_COUNT_H200, blocks, steps, reads, True, rows)
                number += 1
            queued.append(self.torch.cuda.Event())
            queued[-1].record()
            if len(queued) > 2:  # the GPU is never without work
                queued[-3].synchronize()
                looks.append((time.perf_counter() - began, *board.sample()))
        self.torch.cuda.synchronize()
        seen = log[:number].cpu().numpy().astype(np.float64)
        mhz = np.median(seen[:, :, 2] / (seen[:, :, 1] - seen[:, :, 0]), axis=1) * 1000
        at = (seen[:, 0, 1] - seen[0, 0, 0]) / 1e9
        late = [look for look in looks if look[0] > SETTLED]
        cycles = float(np.median(seen[:, :, 2]))
        lasts = np.median(seen[:, :, 1].max(axis=1) - seen[:, :, 0].min(axis=1))
        return {
            "steps": steps, "reads": reads, "rows": rows,
            "tensor": round(steps * TENSOR_CYCLES * blocks / cycles, 4),
            "tb_per_s": round(SM_COUNT_H200 * blocks * BLOCK_BYTES / lasts / 1000, 3) if reads else 0.0,
            "mhz_at_once": round(float(np.median(mhz[at < 0.03])), 1),
            "mhz": round(float(np.median(mhz[at > SETTLED])), 1),
            "mhz_asked": statistics.median(look[4] for look in late),
            "watts": round(statistics.median(look[2] for look in late), 1),
            "watts_by_energy": round((late[-1][3] - late[0][3]) / (late[-1][1] - late[0][1]), 1),
        }  # fmt: skip


def main():
    """Measure and write, the clocks row by row."""
    out = parse_out(__doc__)
    walks, board = Walks(), Board()
    results = {"rates": [], "clocks": []}
    cases = [(slots, ctas, steps, alone) for alone, of in ((True, ALONE), (False, SHARED)) for steps in STEPS for slots, ctas in of]
    for case in cases:
        results["rates"].append(walks.rate(*case))
    write(out, "walks", "kernels/calibrate/walks.cu", source(), results)
    clocks = [(steps, reads, "normal") for reads in (False, True) for steps in MMA]
    clocks += [(steps, reads, rows) for steps, reads in ((32, True), (128, False)) for rows in ROWS if rows != "normal"]
    for steps, reads, rows in clocks:
        results["clocks"].append(walks.clock(board, steps, reads, rows))
        write(out, "walks", "kernels/calibrate/walks.cu", source(), results)


if __name__ == "__main__":
    main()
