"""Phase: what one warp executes between two points of a schedule's order, as instructions by pipe."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True)
class Phase:
    """Warp instructions per chunk by pipe, how many chunks, and the chain of dependent work that ends the phase."""

    fma: int = 0  # FFMA, FADD, FMUL
    alu: int = 0  # FMNMX, ISETP, FSEL, integer
    mufu: int = 0  # EX2, RCP, LG2
    convert: int = 0  # F2FP: two fp32 to a packed pair
    other: int = 0  # issue slots only: SHFL, PRMT, uniform
    stsm: int = 0  # STSM.x4, or other stores of 16 bytes a lane
    loads: int = 0  # LDS of 16 bytes a lane, whichever lanes share them
    matrices: int = 0  # LDSM.x4 and STSM.x4 of a loop that does little else
    chunks: int = 1
    latencies: int = 0  # of a shuffle
    votes: int = 0  # of the warp, with what is compared before and the branch behind
    divisions: int = 0  # of integers, by run-time values
    branches: int = 0  # taken
    fetched: int = 0  # instructions that the nearest instruction caches have lost; who comes first fetches them for all
    own: bool = False  # whether the step has a copy of this code that no other step runs
    stalls: int = 0  # cycles that one warp alone takes for a chunk at least, by the counts in the instructions
    interleaved: bool = False
    """Instructions lie evenly between others: exponentials so that MUFU reaches its rate, FMA alone so that WGMMA keeps its own."""
    goes_on: bool = False
    """What comes next does not wait for its last results, as where the compiler has put something between."""

    @property
    def instructions(self) -> int:
        """How many a warp issues, without those that store to shared memory."""
        return self.chunks * (self.fma + self.alu + self.mufu + self.convert + self.other)


PHASE = np.dtype([(each.name, "i4") for each in fields(Phase)])
"""The same as one row of a program's table."""
