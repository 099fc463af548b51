"""Validation of kernels of few queries whose keys are walked in parts (`--kind decode`)."""
