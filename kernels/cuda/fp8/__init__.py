"""The Hopper schedules in FP8 (e4m3): the same .cu files over headers of their own, V transposed inside the kernel."""
