"""The model: what the hardware would do. numpy and numba only."""
