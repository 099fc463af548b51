"""What is wrong with a command line that does not parse, in one sentence with a hint."""

from __future__ import annotations

from cyclopts import (
    CoercionError,
    CycloptsError,
    MissingArgumentError,
    RepeatArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
    ValidationError,
)

from ..simulator.errors import did_you_mean

_KINDS = {int: "a whole number", float: "a number", bool: "true or false: give the option alone"}


def sentence(error: CycloptsError) -> str:
    """Cyclopts' error in our words: what was asked, the nearest that there is, and where to read on."""
    command = " ".join(error.command_chain or ("fasim",))
    see = f"`{'fasim ' * bool(error.command_chain)}{command} --help` says what there is"
    if isinstance(error, UnknownCommandError):
        commands = [name for name in error.app or () if not name.startswith("-")]
        asked = error.unused_tokens[0]
        return f"command {asked!r} is not known ({', '.join(commands)}){did_you_mean(asked, commands)}"
    if isinstance(error, UnknownOptionError):
        asked = (error.token.keyword or error.token.value).partition("=")[0]
        options = [name[2:] for each in error.argument_collection if each.parse for name in each.names if name.startswith("--")]
        return f"{command} has no option {asked}{did_you_mean(asked.lstrip('-'), options, prefix='--') or f'; {see}'}"
    if isinstance(error, CoercionError) and error.token is not None and error.target_type in _KINDS:
        name = error.token.keyword or (error.argument.name.lstrip("-").upper() if error.argument is not None else command)
        return f"{name} {error.token.value!r} is not {_KINDS[error.target_type]}"
    if isinstance(error, UnusedCliTokensError):
        return f"{command} has no use for {' '.join(error.unused_tokens)!r}; {see}"
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        name = error.keyword or error.argument.name
        return f"{command} needs a value for {name if name.startswith('-') else name.upper()}; {see}"
    if isinstance(error, RepeatArgumentError):
        name = error.token.keyword or command
        listed = f"; several are a list, as {name} a,b" if command.endswith("sweep") else ""
        return f"{name} is given twice, and {command} takes one{listed}"
    if isinstance(error, ValidationError) and error.exception_message:
        return error.exception_message
    return str(error)
