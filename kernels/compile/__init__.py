"""Compile: what compilers and disassemblers say of a kernel. Needs no GPU."""
