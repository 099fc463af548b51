"""Attention in Gluon, Triton's lower language: a ladder of forward kernels for Hopper, each one idea past the last."""
