"""Cluster: a sweep's predictions made by the workers of a Dask scheduler, somebody's or one of our own for the while.

Dask hands out, retries what a lost worker had, and gives each answer once; nothing here schedules. The workers need this very
fasim: one with other sources is refused, since its rows would be of another model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from ...simulator.errors import UsageError
from ...simulator.results.run import Run
from ...simulator.values import shown
from ..predictions import Elsewhere, Question, content, processes, simulator_hash, tried

if TYPE_CHECKING:
    from distributed import Client

LOCAL = "local"
"""In place of an address: a scheduler and workers on this machine, which end with the sweep."""
TIMEOUT_S = 10
_LOUD = tuple(f"distributed.{part}" for part in ("worker", "nanny", "scheduler", "core", "batched", "client"))
RETRIES = 3
"""Of one question whose workers are lost, before its row says so."""


@contextmanager
def connected(address: str, workers: int | None = None) -> Iterator[Elsewhere]:
    """What makes predictions on the workers of the scheduler at `address`, such as tcp://scheduler:8786, or on LOCAL ones.

    Raises UsageError where Dask is not installed, nobody answers, or a worker has another fasim.
    """
    try:
        import distributed
    except ImportError:
        raise UsageError("--dask needs Dask: pip install 'fasim[cluster]'") from None
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # a worker that is lost is no news: its work is done elsewhere
    with ExitStack() as stack:
        if address == LOCAL:
            count = workers or processes()
            how = {"n_workers": count, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
            address = stack.enter_context(distributed.LocalCluster(**how, silence_logs=logging.CRITICAL)).scheduler_address
        elif workers is not None:
            raise UsageError("--workers is how many processes are started here; those of a scheduler are started where it is")
        try:
            client = stack.enter_context(distributed.Client(address, timeout=TIMEOUT_S))
        except (OSError, ValueError, TimeoutError) as error:
            why = " ".join(str(error).split())[:120]
            raise UsageError(f"no Dask scheduler answers at {shown(address)} ({why}); give tcp://host:8786 or {LOCAL}") from None
        if not client.scheduler_info()["workers"]:
            raise UsageError(f"the Dask scheduler at {address} has no workers: start some with `dask worker {address}`")
        _same_model(client)
        yield lambda missing: _answers(client, missing)


def answer(question: Question, model: str) -> Run | UsageError:
    """What a worker does with a question. Raises RuntimeError where its fasim is of other sources."""
    if simulator_hash() != model:
        raise RuntimeError(_ANOTHER)
    return tried(question)


def model_here() -> str:
    """The hash of the fasim that runs this, a worker's where a worker does."""
    return simulator_hash()


_ANOTHER = "its fasim has other sources, and so another model; install the same there"


def _same_model(client: Client) -> None:
    """Raise UsageError where a worker has another fasim, or none."""
    try:
        found = client.run(model_here)
    except Exception as error:  # whatever unpickling a function of a package that is not there raises
        raise UsageError(f"a Dask worker cannot run this fasim ({type(error).__name__}): install it there too") from None
    others = [worker for worker, model in found.items() if model != simulator_hash()]
    if others:
        raise UsageError(f"Dask worker {others[0]}: {_ANOTHER}")


def _answers(client: Client, missing: Sequence[Question]) -> Iterator[tuple[Question, Run | UsageError]]:
    from distributed import as_completed

    model = simulator_hash()
    asked = {
        client.submit(answer, question, model, key=f"fasim-{content(question)}", retries=RETRIES): question for question in missing
    }
    for future in as_completed(list(asked), loop=client.loop):  # of this client, whichever others there are
        error = future.exception()
        yield asked.pop(future), UsageError(f"no worker could answer: {error}") if error else future.result()
