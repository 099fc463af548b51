"""Smaller CTAs that share an SM, for short rows at head_dim 64: the schedules' own .cu files over another common header."""
