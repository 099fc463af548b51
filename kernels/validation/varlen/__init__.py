"""Validation of kernels of packed sequences (`--kind varlen`)."""
