"""Launches of what Triton compiled, past its launcher: a few microseconds on the host."""
