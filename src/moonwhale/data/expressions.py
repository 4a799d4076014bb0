"""Parses mathematical expressions without evaluating them as Python, as sympy's own parser would."""

import ast
import operator
import sys

import sympy
from sympy.parsing import sympy_parser

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
FUNCTIONS = "exp log ln sqrt Abs sin cos tan cot sec csc asin acos atan sinh cosh tanh asinh acosh atanh"
NAMES = {name: getattr(sympy, name) for name in f"{FUNCTIONS} pi E I".split()}
LARGEST_EXPONENT = 1000


def replace_parser(package: str = "sympy") -> None:
    """Replaces sympy's `parse_expr`, which calls `eval`, in all imported modules of sympy and of `package`.

    sympy's `sympify` calls it too, for texts.
    """
    original = sympy_parser.parse_expr
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("sympy", package) and vars(module).get("parse_expr") is original:
            module.parse_expr = parse_expression


def parse_expression(text: str, local_dict: dict | None = None, **_) -> sympy.Expr:
    """Returns the expression that a text writes in Python's syntax, as sympy's `parse_expr` does.

    It may hold numbers, the operators + - * / **, the functions and constants of NAMES, and symbols. `local_dict` gives
    the values of names; any other name is a symbol.

    Raises:
        ValueError: the text holds anything else. SyntaxError is raised if it is no expression.
    """
    return _build(ast.parse(text.strip(), mode="eval").body, NAMES | (local_dict or {}))


def _build(node: ast.expr, names: dict) -> sympy.Expr:
    match node:
        case ast.Constant(value=number) if type(number) in (int, float):
            return sympy.sympify(number)
        case ast.Name(id=name):
            return _expression(names.get(name, sympy.Symbol(name)))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_build(operand, names))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            left, right = _build(left, names), _build(right, names)
            if isinstance(op, ast.Pow) and right.is_number and abs(right) > LARGEST_EXPONENT:
                raise ValueError(f"an exponent is larger than {LARGEST_EXPONENT}")
            return OPERATORS[type(op)](left, right)
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in FUNCTIONS.split():
            return NAMES[name](_build(argument, names))
    raise ValueError(f"{ast.unparse(node)[:80]} is no part of an expression")


def _expression(value: object) -> sympy.Expr:
    if not isinstance(value, sympy.Expr):  # a function without its argument
        raise ValueError(f"{value} is no value")
    return value
