"""The backward on Hopper, in CUDA: preprocess, main kernel, postprocess."""
