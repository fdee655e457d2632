"""Programs that are nearly right: one node of the syntax tree is changed."""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Callable

_SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.FloorDiv,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.FloorDiv,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


def _changes(node: ast.AST) -> list[Callable[[ast.AST], None]]:
    """What can be done to a node, as functions that change it in place."""
    found: list[Callable[[ast.AST], None]] = []
    for name in ("op", "ops"):
        value = getattr(node, name, None)
        operator = value[0] if isinstance(value, list) else value
        if type(operator) in _SWAPS:
            new = _SWAPS[type(operator)]()
            found.append(lambda n, a=name, v=value, o=new: setattr(n, a, [o, *v[1:]] if isinstance(v, list) else o))
    if isinstance(node, ast.Constant) and type(node.value) is int:
        found += [lambda n, d=delta: setattr(n, "value", n.value + d) for delta in (-1, 1)]
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value:
        found.append(lambda n: setattr(n, "value", n.value[1:]))
    if isinstance(node, ast.Return) and node.value is not None:
        for wrapper in ("list", "tuple", "str", "float"):
            found.append(lambda n, w=wrapper: setattr(n, "value", ast.Call(ast.Name(w, ast.Load()), [n.value], [])))
        found.append(lambda n: setattr(n, "value", None))
    return found


def mutate(program: str, count: int, seed: str) -> list[str]:
    """Up to ``count`` different programs that differ from ``program`` in one place."""
    tree = ast.parse(program)
    places = [(index, change) for index, node in enumerate(ast.walk(tree)) for change in range(len(_changes(node)))]
    random.Random(seed).shuffle(places)
    found: list[str] = []
    for index, change in places[:count]:
        changed = copy.deepcopy(tree)
        node = next(node for number, node in enumerate(ast.walk(changed)) if number == index)
        _changes(node)[change](node)
        found.append(ast.unparse(ast.fix_missing_locations(changed)))
    return found
