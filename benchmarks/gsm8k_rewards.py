"""Python reward functions of the GSM8K setting, named in a configuration as `benchmarks.gsm8k_rewards:NAME`."""

import ast
import operator
import re
from collections.abc import Callable, Sequence

Prompts = Sequence[list[dict[str, str]]]

ANNOTATION = re.compile(r"<<([^<>]*)>>")
SUM = re.compile(r"([0-9.+\-*/() ]{1,60})=(-?[0-9]*\.?[0-9]+)")
OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def right_share(prompts: Prompts, responses: Sequence[str]) -> list[float]:
    """The share of a response's own annotations `<<expression=value>>` that are right; 0 if it has none."""
    verdicts = [[is_right(text) for text in ANNOTATION.findall(response)] for response in responses]
    return [sum(each) / len(each) if each else 0.0 for each in verdicts]


def right_count(prompts: Prompts, responses: Sequence[str]) -> list[float]:
    """How many of a response's own annotations are right. It has many ties, and its top is rare."""
    return [float(sum(map(is_right, ANNOTATION.findall(response)))) for response in responses]


def is_right(annotation: str) -> bool:
    """Whether `expression=value` is a sum (+, -, *, / of two numbers at least) that equals its value to a cent."""
    found = read(annotation)
    return found is not None and is_equal(*found)


def is_equal(computed: float, stated: float) -> bool:
    """To a cent."""
    return abs(computed - stated) < 0.01


def read(annotation: str) -> tuple[float, float] | None:
    """What `expression` of `expression=value` comes to, and the value; None where it is no sum of two numbers."""
    found = SUM.fullmatch(annotation)
    if found is None:
        return None
    try:
        tree = ast.parse(found[1].strip(), mode="eval").body
        return (_value(tree), float(found[2])) if isinstance(tree, ast.BinOp) else None
    except (SyntaxError, ArithmeticError, RecursionError, MemoryError, ValueError):
        return None


def _value(node: ast.AST) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left), _value(right))
    raise ValueError(f"{ast.dump(node)}: not a sum")
