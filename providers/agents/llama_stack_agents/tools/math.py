"""Arithmetic for models that cannot count: exact on whole numbers and fractions, floating point for the rest.

An expression is read with Python's own parser and walked by hand over a short list of nodes; nothing is evaluated,
compiled or looked up. Every intermediate value has a size limit that is checked before the value is made.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from fractions import Fraction

from llama_stack.errors import InvalidRequestError
from llama_stack.tools import Tool

Number = Fraction | float

MAX_CHARACTERS = 1000
MAX_NODES = 500
MAX_BITS = 4096
"""The largest numerator or denominator."""
MAX_FACTORIAL = 400
SHOWN_DIGITS = 12
"""Significant digits of a value that is not exact."""

_CONSTANTS: Mapping[str, float] = {"pi": math.pi, "e": math.e, "tau": math.tau}
_SPELLINGS: Mapping[str, str] = {"\u00d7": "*", "\u00b7": "*", "\u00f7": "/", "\u2212": "-", "\u2013": "-", "^": "**"}
_TIMES = re.compile(r"(?<=[\d)])\s+x\s+(?=[\d(])")
_PERCENT_OF = re.compile(r"%\s+of\b")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_FUNCTION = re.compile(r"[A-Za-z0-9_]*[A-Za-z_]\s*\(")


def math_tool(name: str) -> Tool:
    """The tool under a name: ``math`` is one that Llama models know and call with a ``query``."""

    async def answer(query: str) -> str:  # not in a thread: every expression has its size limited, and is quick
        """Compute the result."""
        return evaluate(query)

    return Tool.from_function(answer, name=name)


def evaluate(expression: str) -> str:
    """The value of an expression, as text: exact with all its digits, or with twelve significant ones.

    Raises ``InvalidRequestError`` for what is no arithmetic, has no value, or is too large.
    """
    if len(expression) > MAX_CHARACTERS:
        raise InvalidRequestError(f"the expression has more than {MAX_CHARACTERS} characters")
    text = _PERCENT_OF.sub("/100*", _TIMES.sub("*", expression.strip().rstrip("=?. ")))
    for spelling, plain in _SPELLINGS.items():
        text = text.replace(spelling, plain)
    if not _FUNCTION.search(text):  # there a comma stands between arguments
        text = _THOUSANDS.sub("", text)
    if not text.isascii():
        raise InvalidRequestError("the expression has characters that are no arithmetic")
    try:
        tree = ast.parse(text, mode="eval")
        if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
            raise InvalidRequestError("the expression is too long")
        return _shown(_value(tree.body))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InvalidRequestError(f"{expression[:100]!r} is no arithmetic expression") from error
    except ZeroDivisionError as error:
        raise InvalidRequestError("division by zero") from error
    except OverflowError as error:
        raise InvalidRequestError("the value is too large") from error


def _value(node: ast.expr) -> Number:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return _bounded(_literal(node.value))
    if isinstance(node, ast.Name) and node.id.lower() in _CONSTANTS:
        return _CONSTANTS[node.id.lower()]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _SIGNS:
        return _SIGNS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _bounded(_OPERATORS[type(node.op)](_value(node.left), _value(node.right)))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return _bounded(_called(node.func.id.lower(), [_value(argument) for argument in node.args]))
    raise InvalidRequestError(f"{ast.unparse(node)[:100]!r} is no arithmetic; there are + - * / // % ** and functions")


def _literal(value: int | float) -> Fraction:
    """The decimal as it was written: a tenth, not the nearest binary fraction."""
    return Fraction(repr(value)) if isinstance(value, float) and math.isfinite(value) else Fraction(value)


def _called(name: str, arguments: list[Number]) -> Number:
    function = _FUNCTIONS.get(name)
    if function is None:
        raise InvalidRequestError(f"there is no function {name!r}; there are {', '.join(sorted(_FUNCTIONS))}")
    try:
        return function(*arguments)
    except TypeError as error:
        raise InvalidRequestError(f"{name} does not take {len(arguments)} such arguments") from error
    except ValueError as error:
        raise InvalidRequestError(f"{name} has no value there") from error


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if bits * abs(exponent) > MAX_BITS:
            raise OverflowError
        return Fraction(base ** int(exponent))
    if base < 0:
        raise InvalidRequestError("a root of a negative number is no real number")
    return math.pow(base, exponent)


def _square_root(value: Number) -> Number:
    if value < 0:
        raise InvalidRequestError("a root of a negative number is no real number")
    if isinstance(value, Fraction):
        roots = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
        if roots * roots == value:
            return roots
    return math.sqrt(value)


def _factorial(value: Number) -> Fraction:
    number = _whole(value)
    if not 0 <= number <= MAX_FACTORIAL:
        raise InvalidRequestError(f"factorial takes whole numbers from 0 to {MAX_FACTORIAL}")
    return Fraction(math.factorial(number))


def _combinations(n: Number, k: Number) -> Fraction:
    many, few = _whole(n), _whole(k)
    if not 0 <= few <= many <= 10_000 or min(few, many - few) > MAX_FACTORIAL:
        raise InvalidRequestError("comb takes whole numbers n >= k >= 0 that are not too large")
    return Fraction(math.comb(many, few))


def _rounded(value: Number, digits: Number = Fraction(0)) -> Fraction:
    places = _whole(digits)
    if abs(places) > 100:
        raise InvalidRequestError("round takes at most 100 digits")
    return Fraction(round(Fraction(value), places))


def _whole(value: Number) -> int:
    if value != int(value):
        raise InvalidRequestError("a whole number is needed there")
    return int(value)


def _integer_of(function: Callable[[int, int], int]) -> Callable[[Number, Number], Fraction]:
    return lambda a, b: Fraction(function(_whole(a), _whole(b)))


def _real(function: Callable[..., float]) -> Callable[..., Number]:
    return lambda *arguments: function(*map(float, arguments))


def _logarithm(function: Callable[..., float]) -> Callable[..., Number]:
    """Of whole numbers as they are: they may be larger than any floating-point number."""
    return lambda *arguments: function(*(int(each) if each == int(each) else float(each) for each in arguments))


_SIGNS: Mapping[type[ast.unaryop], Callable[[Number], Number]] = {ast.UAdd: lambda a: a, ast.USub: lambda a: -a}
_OPERATORS: Mapping[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
_FUNCTIONS: Mapping[str, Callable[..., Number]] = {
    "abs": abs,
    "min": min,
    "max": max,
    "round": _rounded,
    "floor": lambda value: Fraction(math.floor(value)),
    "ceil": lambda value: Fraction(math.ceil(value)),
    "sqrt": _square_root,
    "factorial": _factorial,
    "comb": _combinations,
    "gcd": _integer_of(math.gcd),
    "lcm": _integer_of(math.lcm),
    "exp": _real(math.exp),
    "log": _logarithm(math.log),
    "ln": _logarithm(math.log),
    "log2": _logarithm(math.log2),
    "log10": _logarithm(math.log10),
    "sin": _real(math.sin),
    "cos": _real(math.cos),
    "tan": _real(math.tan),
    "asin": _real(math.asin),
    "acos": _real(math.acos),
    "atan": _real(math.atan),
    "degrees": _real(math.degrees),
    "radians": _real(math.radians),
}


def _bounded(value: Number) -> Number:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise OverflowError
    elif max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise OverflowError
    return value


def _shown(value: Number) -> str:
    """Whole numbers and short decimals in full; other fractions as such, with their decimal value."""
    if isinstance(value, float):
        return f"{value:.{SHOWN_DIGITS}g}"
    if value.denominator == 1:
        return str(value.numerator)
    exact = f"{value.numerator}/{value.denominator}"
    try:
        decimal = f"{float(value):.{SHOWN_DIGITS}g}"
    except OverflowError:
        return exact
    return decimal if Fraction(decimal) == value else f"{exact} = {decimal}"
