"""FP8 kernels held to fp64 of what their e4m3 inputs and descales say, and to the error that FP8 arithmetic makes by itself."""
