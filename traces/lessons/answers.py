"""Is an answer right? A number, or a product somebody has not multiplied out: "4 * 16 * 4096**2", held to the model's."""

from __future__ import annotations

import ast
import operator
from dataclasses import dataclass

from ...simulator.errors import UsageError
from ...simulator.values import shown
from .parts import Question

MAX_LENGTH = 200
"""Characters of an answer."""
_STEPS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: operator.pow}
_SIGNS = {ast.UAdd: operator.pos, ast.USub: operator.neg}


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right, and the number it was read as."""

    right: bool
    given: float


def check(question: Question, answer: str) -> Verdict:
    """Hold an answer to the question's own, within its tolerance. Raises UsageError where it is no number."""
    given = read(answer, question.unit)
    return Verdict(abs(given - question.answer) <= question.tolerance * abs(question.answer) + 1e-12, given)


def read(answer: str, unit: str = "") -> float:
    """The number an answer stands for: "8.6", "8,600", "8.6 GB" where GB was asked for, or arithmetic with + - * / and **.

    Raises UsageError, one sentence, for anything else.
    """
    text = answer.strip().replace("^", "**").replace("−", "-")
    if unit and text.lower().endswith(unit.lower()):
        text = text[: len(text) - len(unit)]
    elif text.endswith("%"):
        text = text[:-1]
    if text.count(",") == 1 and "." not in text and len(text.rpartition(",")[2].strip()) != 3:
        raise UsageError(f"{shown(answer)} has a comma: write a decimal point, as in 8.6")
    text = text.replace(",", "").strip()
    try:
        if not text or len(text) > MAX_LENGTH:
            raise ValueError
        value = _value(ast.parse(text, mode="eval").body)
        if not abs(value) < float("inf"):
            raise ValueError
    except (ValueError, SyntaxError, ArithmeticError, MemoryError, RecursionError, TypeError) as error:
        wanted = f" in {unit}" if unit else ""
        raise UsageError(
            f"{shown(answer)} is not a number{wanted}: give one, such as 8.6, or what to compute, as 4 * 2**10"
        ) from error
    return value


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(node.value)  # of floats, so that no power takes for ever
    if isinstance(node, ast.UnaryOp) and type(node.op) in _SIGNS:
        return _SIGNS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _STEPS:
        value = _STEPS[type(node.op)](_value(node.left), _value(node.right))
        if isinstance(value, float):
            return value
    raise ValueError
