"""Timing, clocks, counters and stamps: how a kernel is run on a GPU and becomes a Run.

From what is read to what is made of it: `board` (NVML) and `clock_probe` (the SMs' own counters), `trains` (calls between
events), `counters` (Nsight Compute), `plan` (what to run), `names` (whose kernel it is; `peers` are other people's), `bench`
(one kernel on one workload), `timeline` (the build that stamps), `runs` (a plan of them). `beside` holds kernels against each
other, in turns.
"""
