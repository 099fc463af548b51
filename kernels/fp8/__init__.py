"""FP8 attention from 16-bit tensors: quantiser, incoherent processing, and what e4m3 and Hopper's arithmetic make of it."""
