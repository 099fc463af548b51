"""The Hopper schedules as CUDA C++ for sm_90a: one .cu per schedule, the PTX wrappers once in headers."""
