"""Sequences packed one behind another, of any lengths: Triton's kernels, their arguments and the operator."""
