"""fasim: what a FlashAttention schedule does on a Hopper GPU, before the kernel is written.

    import fasim

    run = fasim.predict(fasim.Workload(batch=4, heads=16, seqlen=8448, head_dim=128), schedule="fa3", device="h200")
    run.to_dict()

Names are resolved on first use, so that `import fasim` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "Workload": ".simulator.problem.workload",
    "Tile": ".simulator.problem.tile",
    "Run": ".simulator.results.run",
    "UsageError": ".simulator.errors",
    "predict": ".simulator.predict",
    "measure": ".kernels.measure.runs",
    "compare": ".traces.compare",
    "timeline": ".cli.notebook",
    "sweep": ".traces.answers.sweep",
    "walk": ".traces.walk",
    "validate": ".kernels.validation.suite",
}

__all__ = [
    "Run", "Tile", "UsageError", "Workload", "__version__", "compare", "measure", "predict", "sweep", "timeline", "validate",
    "walk",
]  # fmt: skip

if TYPE_CHECKING:
    from .cli.notebook import timeline
    from .kernels.measure.runs import measure
    from .kernels.validation.suite import validate
    from .simulator.errors import UsageError
    from .simulator.predict import predict
    from .simulator.problem.tile import Tile
    from .simulator.problem.workload import Workload
    from .simulator.results.run import Run
    from .traces.answers.sweep import sweep
    from .traces.compare import compare
    from .traces.walk import walk


def __getattr__(name: str) -> object:
    """Import the module that holds `name` and keep the result (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
