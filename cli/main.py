"""The command `fasim`: registers the commands and turns every failure into one sentence and an exit status.

Exit status: 0 good, 1 a check failed, 2 usage, 3 no GPU or tool for what was asked, 130 interrupted, 141 where a
pipe was closed before all was written to it.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from cyclopts import App, CycloptsError

from .. import __version__
from ..simulator.errors import UsageError
from ..simulator.values import printable
from . import process, usage
from .calibrate import calibrate
from .commands.accuracy import accuracy
from .commands.advise import advise
from .commands.inspect import inspect
from .commands.kernels import kernels
from .commands.learn import learn
from .commands.listings import devices, disasm, schedules
from .commands.predict import predict
from .commands.published import published
from .commands.roofline import roofline
from .commands.sweep import sweep
from .commands.timeline import timeline
from .commands.tune import tune
from .commands.validate import validate
from .commands.walk import walk
from .compare import compare
from .doctor import doctor
from .measure import measure
from .plain import fall_back

OK, CHECK_FAILED, USAGE, NO_TOOL, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 3, 130, 141

app = App(
    name="fasim",
    version=__version__,
    help_format="plaintext",
    help="What a FlashAttention schedule does on a Hopper GPU, before the kernel is written.\n\n"
    "Start with: fasim predict pingpong\n\nOr learn why attention is slow: fasim learn",
)
for _place, _command in enumerate(
    (
        learn,
        predict,
        sweep,
        tune,
        advise,
        timeline,
        walk,
        roofline,
        published,
        schedules,
        devices,
        disasm,
        validate,
        accuracy,
        measure,
        calibrate,
        compare,
        doctor,
        kernels,
        inspect,
    )
):
    app.command(_command, sort_key=_place, help_format="markdown")

app.register_install_completion_command()  # --install-completion, for bash, zsh and fish


def _fail(message: str) -> int:
    """Print `message` as one sentence on stderr; the status of a usage error."""
    sys.stderr.write("fasim: " + printable(" ".join(message.split())) + "\n")
    return USAGE


def run(tokens: list[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit status."""
    os.environ.setdefault("NUMBA_OPT", "1")  # the first run compiles sooner; the replay is as fast as with more
    try:
        status = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except CycloptsError as error:
        return _fail(usage.sentence(error))
    except UsageError as error:
        return _fail(str(error))
    except BrokenPipeError:
        return _nothing_more(BROKEN_PIPE)
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich met it
            return _nothing_more(BROKEN_PIPE)
        raise
    except OSError as error:
        _nothing_more()
        what = f"read or write {error.filename}" if error.filename else "write to stdout"
        return _fail(f"cannot {what}: {error.strerror or error}")
    except MemoryError:
        return _fail("this machine has not the memory for it: give a smaller workload")
    except KeyboardInterrupt:
        return INTERRUPTED
    return status if isinstance(status, int) else OK


def _nothing_more(status: int = OK) -> int:
    """Let what is still buffered for stdout go nowhere, so that flushing at exit does not fail again."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def main() -> None:
    """Entry point of the command `fasim`."""
    app.suppress_keyboard_interrupt = False
    if sys.stderr is None:  # closed by the caller, 2>&-
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        sys.exit(_fail("stdout is closed, so there is nowhere to print: send it to a file or to /dev/null"))
    fall_back(sys.stdout)
    fall_back(sys.stderr)
    process.prepare()
    status = run()
    if status == INTERRUPTED:
        os._exit(status)  # at once: taking the compiler apart takes a good part of a second
    sys.exit(status)
