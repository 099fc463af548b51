"""Attention in Triton, one schedule per file, named as in `simulator/schedules`.

They run on the GPU, and on the CPU when TRITON_INTERPRET=1 is set before Triton is imported.
"""
