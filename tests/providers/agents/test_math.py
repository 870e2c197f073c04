"""Arithmetic: exact where it can be, and nothing else."""

from __future__ import annotations

import pytest
from llama_stack_agents.tools.math import MAX_CHARACTERS, evaluate, math_tool

from llama_stack.errors import InvalidRequestError

pytestmark = pytest.mark.anyio

VALUES = {
    "17 * 23": "391",
    "2 + 2 =": "4",
    "What": None,
    "0.1 + 0.2": "0.3",
    "1/3": "1/3 = 0.333333333333",
    "1/3 + 2/3": "1",
    "2**100": "1267650600228229401496703205376",
    "2^10": "1024",
    "-2**2": "-4",
    "(-2)**2": "4",
    "2**-2": "0.25",
    "2**0.5": "1.41421356237",
    "sqrt(16)": "4",
    "sqrt(9/4)": "1.5",
    "sqrt(2)": "1.41421356237",
    "7 // 2": "3",
    "-7 // 2": "-4",
    "7 % 3": "1",
    "15% of 80": "12",
    "1,234,567 + 1": "1234568",
    "gcd(12,180)": "12",
    "lcm(4, 6)": "12",
    "17 x 23": "391",
    "6 \u00d7 7": "42",
    "84 \u00f7 2": "42",
    "5 \u2212 3": "2",
    "factorial(20)": "2432902008176640000",
    "comb(52, 5)": "2598960",
    "max(1, 2/3, 0.5)": "1",
    "min(3, 2)": "2",
    "abs(-5)": "5",
    "round(2.675, 2)": "2.68",
    "round(7/2)": "4",
    "floor(-1.5)": "-2",
    "ceil(1.2)": "2",
    "log(e)": "1",
    "log10(1000)": "3",
    "log2(8)": "3",
    "log(8, 2)": "3",
    "log10(10**400)": "400",
    "log2(2**2000)": "2000",
    "ln(0.5)": "-0.69314718056",
    "sin(0)": "0",
    "cos(pi)": "-1",
    "PI": "3.14159265359",
    "degrees(pi)": "180",
    "exp(0)": "1",
    "1e3 * 2": "2000",
    "1_000 + 1": "1001",
    "0x10": "16",
    "((1 + 2) * (3 + 4)) / 7": "3",
    "99999999999999999999 * 99999999999999999999": "9999999999999999999800000000000000000001",
}
"""Expressions and their values; one that is none."""

REFUSED = [
    "",
    " ",
    "=",
    "9**9**9",
    "2**99999",
    "(2**4000)*(2**4000)",
    "factorial(factorial(9))",
    "factorial(401)",
    "factorial(-1)",
    "factorial(2.5)",
    "1 << 99999",
    "1/0",
    "0**-1",
    "5 % 0",
    "sqrt(-1)",
    "(-1)**0.5",
    "log(0)",
    "log(-1)",
    "asin(2)",
    "1e400",
    "exp(1000)",
    "comb(9999, 5000)",
    "comb(2, 3)",
    "round(1, 10**9)",
    "__import__('os')",
    "open('/etc/passwd')",
    "().__class__",
    "x",
    "a.b",
    "'a' * 99",
    "[1] * 99",
    "lambda: 1",
    "1 if 1 else 2",
    "True + 1",
    "1 == 1",
    "not 1",
    "~1",
    "1 and 2",
    "{1: 2}",
    "1; 2",
    "x = 1",
    "(x := 1)",
    "f'{1}'",
    "print(1)",
    "sin()",
    "sin(1, 2)",
    "max(key=1)",
    "sqrt(x=4)",
    "1j",
    "...",
    "None",
    "\u0661 + 1",
    "\u2460 + 1",
    "1 + " * 400 + "1",
    "(" * 300 + "1" + ")" * 300,
    "-" * 900 + "1",
    "1" * (MAX_CHARACTERS + 1),
    "1\0",
    "\ud800",
    "sin(10**400)",
    "await x",
    "*1",
    "**{}",
    "gcd(1.5, 2)",
    "1" + "+1" * 450,
]
"""What is no arithmetic, has no value, or is too large."""


@pytest.mark.parametrize(("expression", "value"), VALUES.items())
async def test_a_value_is_exact_where_it_can_be(expression: str, value: str | None) -> None:
    """Whole numbers and fractions of any size; the rest to twelve digits."""
    if value is None:
        with pytest.raises(InvalidRequestError):
            evaluate(expression)
    else:
        assert evaluate(expression) == value
        assert await math_tool("math").run({"query": expression}) == value


@pytest.mark.parametrize("expression", REFUSED, ids=lambda expression: ascii(expression[:30]))
def test_what_is_no_arithmetic_is_refused_and_never_run(expression: str) -> None:
    """Nothing is evaluated by Python, and nothing large is begun."""
    with pytest.raises(InvalidRequestError):
        evaluate(expression)
