"""Microbenchmarks that fill the calibrated fields of `simulator/devices/*.toml`.

Each module measures one part of the chip and writes one JSON file; none of them runs attention.
Run one on the GPU from the repository root: `python -m kernels.calibrate.tensor_cores --out DIR`.
"""
