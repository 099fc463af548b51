"""Around: what a warp issues at the points of its order beside softmax and products: addresses, phases, descriptors, branches.

Counted from what has to be computed there. These instructions take no time of their own here: what a
barrier costs, and a GEMM's issue, have been measured with them. They fill issue slots. Machine code of every kernel of ours has as
many within a tenth (tests/test_cuda_kernels.py); what is left is the compiler's choice: which copies of a loop find a slot anew,
and which constants stay in registers.
"""

from __future__ import annotations

from .phase import Phase

SLOT = 6
"""Stage and phase of a block's number, which is signed, in a ring of two or four: its sign, add, mask, subtract; shift, mask."""
SLOT_BY_PRODUCT = 3
"""In a ring of another number: the product's high word, its sign added, the remainder; mask. That costs more than a register, so
K's phase is kept for V: one instruction less in V's wait."""
PLACE = 2
"""An address: the stage's multiple and the base."""
WAIT = PLACE + 4
"""The parity into a register and to its bit; the try and the branch behind it."""
FREE = PLACE + 2
"""The elected lane's predicate; the arrival."""
TURN = 2
"""The barrier's number into a register, and the barrier."""
FENCE, DRAIN = 1, 1
"""Before a GEMM's first read of registers; the wait for its group."""
DESCRIPTOR = PLACE + 4
"""Of an operand in shared memory: the address cut and shifted, and the constant half."""
MASK_TEST, UNSEEN_TEST, NEXT_BLOCK, LAST_BLOCK = 3, 2, 5, FREE + 2
"""Once a block: may it need a mask; has no key been seen yet; the loop's count, comparison and branch; whether Q goes back."""
ANOTHER_TRY = 5
"""Behind the vote of a running softmax: the branch over another try, and its outcome kept, compared and branched on again for O."""


def of_gemm(k_steps: int, in_shared_memory: int) -> int:
    """Of one group of WGMMAs with so many operands in shared memory: a step is one, and moves on a descriptor for each of them."""
    return FENCE + DRAIN + DESCRIPTOR * in_shared_memory + k_steps * (1 + in_shared_memory)


class Around:
    """What a pen says of a barrier and of a GEMM's issue."""

    in_pairs = False  # whether the loop's end is shared by two copies of a block
    votes = True  # whether the softmax may try again

    def prologue(self, tile) -> list[Phase]:
        """What a warp executes before its role begins, once a CTA: nothing that is known."""
        return []

    def issues(self, k_steps: int, in_shared_memory: int, scores: bool, stages: int) -> int:
        """Instructions of a group of WGMMAs with those around it; with the one that makes scores, of what comes once a block, whose
        operand lies in a ring of so many stages."""
        if not scores:
            return of_gemm(k_steps, in_shared_memory)
        slot = SLOT_BY_PRODUCT if stages & (stages - 1) else SLOT
        block = slot + MASK_TEST + UNSEEN_TEST + LAST_BLOCK + ANOTHER_TRY * self.votes + NEXT_BLOCK // (1 + self.in_pairs)
        return of_gemm(k_steps, in_shared_memory) + block

    def issues_of_barrier(self, waits: bool, turn: bool) -> int:
        """Instructions of a wait or an arrival, at an mbarrier or of a turn, with its address."""
        return TURN if turn else WAIT if waits else FREE
