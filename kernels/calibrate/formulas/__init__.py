"""How each calibrated field of a device file follows from the recordings: one formula each, listed in `DERIVATIONS`."""

from . import launches, memory, pipes, power, tensor_cores
from .found import Derivation, Found

__all__ = ["DERIVATIONS", "Derivation", "Found"]

DERIVATIONS = (*memory.DERIVATIONS, *tensor_cores.DERIVATIONS, *pipes.DERIVATIONS, *launches.DERIVATIONS, *power.DERIVATIONS)
