"""Replay: the machine. Programs run on tables of a device; it knows cycles, neither attention nor a compiler."""
