"""Single mutations of meaning of a Python file: what could be mistyped or forgotten, as replacements in its text.

Texts for people (docstrings, messages, f-strings, what a `raise` says) and types are left alone. The rest of the text
stays as it is, line numbers included, so that a map of executed lines holds for the mutated file too.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt, ast.GtE), ast.Gt: (ast.GtE, ast.Lt), ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
OTHER_FUNCTION = {
    "min": "max", "max": "min", "any": "all", "all": "any", "floor": "ceil", "ceil": "floor", "sorted": "list",
    "startswith": "endswith", "endswith": "startswith",
}  # fmt: skip
WITHOUT_EFFECT_ON_TYPE = {"strip", "lower", "resolve", "absolute", "clone", "detach", "copy"}
"""Methods without arguments that return the same kind of thing, and so could be forgotten."""
TYPING = {"cast", "TypeVar", "NewType", "ParamSpec", "Literal"}
FOR_PEOPLE = {"help", "description", "title", "metavar", "rich_help_panel", "doc", "strict"}
"""Keywords that say something to people; `strict` of `zip` only guards."""
LOG = {"debug", "info", "warning", "error", "exception"}


@dataclass(frozen=True)
class Mutation:
    """One replacement in a file's text."""

    line: int
    """The line that it begins at, from 1."""
    kind: str
    start: int
    """First byte that is replaced."""
    end: int
    new: str
    lines: tuple[int, ...] = ()
    """Lines that are executed where the mutated code is: of its statement, or of the function whose default it is."""
    names: tuple[str, ...] = ()
    """What to look for instead where code runs when its module is imported: the names that its statement sets."""

    def apply(self, source: str) -> str:
        """Returns the mutated text."""
        text = source.encode()
        return (text[: self.start] + self.new.encode() + text[self.end :]).decode()


def mutations_of(source: str) -> list[Mutation]:
    """Lists all mutations of a file that leave it valid Python with another meaning, in the order of its lines."""
    return sorted(_Reader(source).mutations(), key=lambda m: (m.line, m.start, m.kind, m.new))


class _Reader:
    def __init__(self, source: str) -> None:
        self.tree = ast.parse(source)
        self.line_starts = [0]
        for line in source.encode().splitlines(keepends=True):
            self.line_starts.append(self.line_starts[-1] + len(line))

    def mutations(self) -> Iterator[Mutation]:
        for statement in self.tree.body:
            yield from self.of_statement(statement, in_function=False)

    def of_statement(self, node: ast.stmt, in_function: bool) -> Iterator[Mutation]:
        """Mutates a statement and those within it."""
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Assert | ast.Global | ast.Nonlocal) or _is_text(node):
            return
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.FunctionDef):
            lines = tuple(range(node.body[0].lineno, (node.end_lineno or node.lineno) + 1))
            for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
                yield from self.of_expression(default, lines, ())
        for block in _blocks(node):
            within = in_function or isinstance(node, ast.FunctionDef)
            for inner in block:
                yield from self.of_statement(inner, within)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            return
        lines = _own_lines(node) if in_function else ()
        names = () if in_function else tuple(sorted(_names_set(node)))
        for kind, new in _instead_of_statement(node):
            yield self.replacing(node, kind, new, lines, names)
        if isinstance(node, ast.If | ast.While) and not isinstance(node.test, ast.Compare | ast.BoolOp | ast.UnaryOp):
            yield self.replacing(node.test, "condition", f"(not {ast.unparse(node.test)})", lines, names)
        if not isinstance(node, ast.Raise):
            for expression in _expressions(node):
                yield from self.of_expression(expression, lines, names)

    def of_expression(self, node: ast.expr, lines: tuple[int, ...], names: tuple[str, ...]) -> Iterator[Mutation]:
        """Mutates an expression and those within it."""
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Call) and _name(node.func) in TYPING):
            return
        for kind, changed in _instead_of(node):
            new = ast.unparse(changed)
            if isinstance(changed, ast.BoolOp | ast.UnaryOp | ast.BinOp | ast.IfExp):
                new = f"({new})"
            yield self.replacing(node, kind, new, lines, names)
        if isinstance(node, ast.Call) and _name(node.func) in LOG:
            return
        for key in _keys(node):
            yield self.replacing(key, "other string", repr(f"{ast.literal_eval(key)}_"), lines, names)
        for child in _parts(node):
            yield from self.of_expression(child, lines, names)

    def replacing(
        self, node: ast.stmt | ast.expr, kind: str, new: str, lines: tuple[int, ...], names: tuple[str, ...]
    ) -> Mutation:
        assert node.end_lineno is not None and node.end_col_offset is not None
        start = self.line_starts[node.lineno - 1] + node.col_offset
        end = self.line_starts[node.end_lineno - 1] + node.end_col_offset
        return Mutation(node.lineno, kind, start, end, new, lines, names)


def _instead_of_statement(node: ast.stmt) -> Iterator[tuple[str, str]]:
    to_state = isinstance(node, ast.Assign) and all(not isinstance(t, ast.Name | ast.Tuple) for t in node.targets)
    if to_state or isinstance(node, ast.AugAssign | ast.Raise | ast.Delete):
        yield f"without {type(node).__name__.lower()}", "pass"
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "without call", "pass"
    elif isinstance(node, ast.Continue):
        yield "other jump", "break"
    elif isinstance(node, ast.Break):
        yield "other jump", "continue"
    elif isinstance(node, ast.Return) and node.value is not None and not _is_constant(node.value, None):
        yield "returns nothing", "return None"
    if isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
        yield "arithmetic", ast.unparse(ast.AugAssign(node.target, ARITHMETIC[type(node.op)](), node.value))


def _instead_of(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """Lists what an expression could be mistaken for: a kind and the other expression."""
    match node:
        case ast.Compare(ops=[op]):
            for other in COMPARISONS[type(op)]:
                yield "comparison", ast.Compare(node.left, [other()], node.comparators)
        case ast.BoolOp(op=op, values=values):
            yield "and/or", ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
            yield "without last condition", ast.BoolOp(op, values[:-1]) if len(values) > 2 else values[0]
            yield "without first condition", ast.BoolOp(op, values[1:]) if len(values) > 2 else values[1]
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield "without not or minus", operand
        case ast.IfExp(test=test, body=body, orelse=orelse):
            yield "condition", ast.IfExp(ast.UnaryOp(ast.Not(), test), body, orelse)
        case ast.BinOp(left=left, op=op, right=right):
            if type(op) in ARITHMETIC and not any(isinstance(side, ast.Constant | ast.JoinedStr) and
                                                  not _is_number(side) for side in (left, right)):  # fmt: skip
                yield "arithmetic", ast.BinOp(left, ARITHMETIC[type(op)](), right)
        case ast.Constant(value=bool(value)):
            yield "other constant", ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield "other constant", ast.Constant(value + 1)
            if value > 0:
                yield "other constant", ast.Constant(value - 1)
        case ast.Constant(value=float(value)):
            yield "other constant", ast.Constant(value * 2 if value else 1.0)
        case ast.Subscript(slice=ast.Slice(lower=lower, upper=upper, step=step)):
            if lower is not None:
                yield "without bound", ast.Subscript(node.value, ast.Slice(None, upper, step), node.ctx)
            if upper is not None:
                yield "without bound", ast.Subscript(node.value, ast.Slice(lower, None, step), node.ctx)
        case ast.Call():
            yield from _instead_of_call(node)
        case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
            for number, generator in enumerate(node.generators):
                if generator.ifs:
                    changed = copy.deepcopy(node)
                    changed.generators[number].ifs = []
                    yield "without filter", changed


def _instead_of_call(node: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    called = _name(node.func)
    if called in LOG:
        return
    if len(node.args) >= 2 and not any(isinstance(argument, ast.Starred) for argument in node.args[:2]):
        first, second, *rest = node.args
        yield "swapped arguments", ast.Call(node.func, [second, first, *rest], node.keywords)
    for keyword in node.keywords:
        if keyword.arg is not None and keyword.arg not in FOR_PEOPLE:
            yield "without keyword", ast.Call(node.func, node.args, [k for k in node.keywords if k is not keyword])
    if called in OTHER_FUNCTION:
        func = copy.deepcopy(node.func)
        if isinstance(func, ast.Name):
            func.id = OTHER_FUNCTION[called]
        elif isinstance(func, ast.Attribute):
            func.attr = OTHER_FUNCTION[called]
        keywords = [] if called == "sorted" else node.keywords
        yield "other function", ast.Call(func, node.args, keywords)
    if called in WITHOUT_EFFECT_ON_TYPE and isinstance(node.func, ast.Attribute) and not node.args:
        yield "without method", node.func.value


def _keys(node: ast.expr) -> Iterator[ast.expr]:
    """Lists the strings that a program looks something up by, or compares with."""
    candidates: list[ast.expr | None] = []
    match node:
        case ast.Subscript(slice=key):
            candidates = [key]
        case ast.Dict(keys=keys):
            candidates = [*keys]
        case ast.Compare(left=left, comparators=comparators):
            candidates = [left, *comparators]
        case ast.Call(func=ast.Attribute(attr="get" | "pop" | "getenv"), args=[key, *_]):
            candidates = [key]
    yield from (c for c in candidates if isinstance(c, ast.Constant) and isinstance(c.value, str))


def _parts(node: ast.expr) -> Iterator[ast.expr]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            yield child
        elif isinstance(child, ast.keyword):
            if child.arg not in FOR_PEOPLE:
                yield child.value
        elif isinstance(child, ast.comprehension):
            yield from (child.iter, *child.ifs)


def _expressions(node: ast.stmt) -> Iterator[ast.expr]:
    """Lists a statement's own expressions: not those of the statements in it, nor types."""
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "target", "targets", "returns", "decorator_list"):
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, ast.expr):
                    yield item
                elif isinstance(item, ast.withitem):
                    yield item.context_expr


def _blocks(node: ast.stmt) -> Iterator[list[ast.stmt]]:
    for name in ("body", "orelse", "finalbody"):
        yield getattr(node, name, [])
    for part in (*getattr(node, "handlers", []), *getattr(node, "cases", [])):
        yield part.body


def _own_lines(node: ast.stmt) -> tuple[int, ...]:
    """Lists a statement's lines without those of the statements in it."""
    inner = [block[0].lineno for block in _blocks(node) if block]
    end = max(node.lineno, min(inner) - 1) if inner else node.end_lineno or node.lineno
    return tuple(range(node.lineno, end + 1))


def _names_set(node: ast.stmt) -> Iterator[str]:
    for target in getattr(node, "targets", [getattr(node, "target", None)]):
        if isinstance(target, ast.Name | ast.Attribute):
            yield _name(target)


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_constant(node: ast.expr, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float)
