"""Reading a selection: from text to tokens, to Python's syntax tree, to ours."""

import ast
import bisect
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from peakpoint.catalogue.query import tree
from peakpoint.catalogue.query.tree import FIELDS, Condition, Constant, Field, Kind, Metric, Query, Span, Value, point
from peakpoint.errors import ConfigError
from peakpoint.format.amounts import read_bytes
from peakpoint.format.names import check_metric

# --- tokens -------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""(?P<space>\s+)
      | (?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
      | (?P<quoted>`[^`]+`)
      | (?P<number>(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][+-]?\d++)?(?![\w.]))
      | (?P<name>[^\W\d]\w*(?:\.[^\W\d]\w*)*)
      | (?P<sign><=|>=|==|!=|<>|=|~|[()\[\]<>+*/%,-])
    """,
    re.VERBOSE,
)
_WORDS = {"and": "and", "or": "or", "not": "not", "in": "in", "between": "|"}
_ODD_ESCAPE = re.compile(r"\\[^\"']")
_FOREIGN = dict.fromkeys(("is", "null", "none", "nan"), "ask with has(x) or not has(x)")
_FOREIGN |= dict.fromkeys(("true", "false"), "write pinned or not pinned, for example")
_FOREIGN |= {"like": 'write name ~ "pattern*"'}
_SIGNS = {"=": "==", "<>": "!=", "~": "@"}
_MOST_TOKENS = 2000
_LONGEST = 50_000
_DEEPEST = 40


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    at: Span
    python: str  # what Python's parser sees instead


class _Reader:
    """Reads one text; see ``parse``."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[_Token] = []
        self._starts: list[int] = []  # of the tokens, in what Python's parser sees
        self._deep = 0

    def error(self, at: Span, message: str) -> ConfigError:
        return ConfigError(point(self.text, at, message))

    # --- text -> tokens -> Python's tree

    def python(self) -> ast.expr | None:
        self._cut()
        if not self.tokens:
            return None
        self._rename_between()
        position = 0
        for token in self.tokens:
            self._starts.append(position)
            position += len(token.python) + 1
        try:
            return ast.parse(" ".join(token.python for token in self.tokens), mode="eval").body
        except SyntaxError as error:
            end = self.tokens[-1].at[1]
            offset = error.offset or 0
            at = self._token_at(offset - 1).at if 0 < offset < position else (end, end + 1)
            hint = self._hint(self.tokens.index(self._token_at(offset - 1)) if 0 < offset < position else None)
            closing = "" if "closed" not in error.msg and "unmatched" not in error.msg else ": parentheses do not match"
            raise self.error(at, f"the selection is not understood here{closing}{hint}") from error
        except (MemoryError, RecursionError) as error:
            raise ConfigError("the selection is nested too deeply; write it with fewer parentheses") from error

    def _hint(self, place: int | None) -> str:
        """What may have been meant around a token."""
        before = self.tokens[: len(self.tokens) if place is None else place + 1][-3:]
        if any(token.text == "~" for token in before) and before[-1].kind != "text":
            return '; a pattern stands in quotes, as in run ~ "resnet50*"'
        if len(before) > 1 and before[-2].kind == "number" and before[-1].kind == "name":
            return '; sizes and dates stand in quotes, as in size < "40 MB"'
        return ""

    def _cut(self) -> None:
        if len(self.text) > _LONGEST:
            raise ConfigError(f"the selection is too long: more than {_LONGEST:,} characters")
        position = 0
        while position < len(self.text):
            found = _TOKEN.match(self.text, position)
            if found is None or found.lastgroup is None:
                if self.text[position] in "\"'`":
                    raise self.error((position, len(self.text)), f"what begins with {self.text[position]} has no end")
                odd = self.text[position]
                hint = '; sizes and dates stand in quotes, as in size < "40 MB"' if odd.isdigit() else ""
                raise self.error((position, position + 1), f"{odd!r} has no meaning in a selection{hint}")
            if not found[0].isascii() and any("\ud800" <= character <= "\udfff" for character in found[0]):
                raise self.error(found.span(), "broken bytes, which are no text")
            position = found.end()
            if found.lastgroup != "space":
                self.tokens.append(self._token(found.lastgroup, found[0], found.span()))
        if len(self.tokens) > _MOST_TOKENS:
            raise ConfigError(f"the selection is too long: more than {_MOST_TOKENS} words and signs")

    def _token(self, kind: str, text: str, at: Span) -> _Token:
        python = text
        if kind == "name" and text.lower() in _FOREIGN:
            raise self.error(at, f"{text} has no meaning here; {_FOREIGN[text.lower()]}")
        if kind == "name" and text.lower() in _WORDS:
            kind, python = "word", _WORDS[text.lower()]
        elif kind == "sign":
            python = _SIGNS.get(text, text)
        elif kind in ("name", "quoted", "text"):
            python = f"v{len(self.tokens)}"
        elif kind == "number":
            python = f"{float(text)!r}" if float(text) != float("inf") else "1e999"
        return _Token(kind, text, at, python)

    def _rename_between(self) -> None:
        """``x between a and b`` becomes ``x | a ^ b``, with ``not`` ``x & a ^ b``: these bind as it must."""
        waiting: list[int] = []
        depth = 0
        for number, token in enumerate(self.tokens):
            depth += (token.text in ("(", "[")) - (token.text in (")", "]"))
            if token.kind == "word" and token.python == "|":
                waiting.append(depth)
                if number and self.tokens[number - 1].python == "not" and number > 1:
                    before = self.tokens[number - 1]
                    self.tokens[number - 1] = _Token(before.kind, before.text, before.at, "")
                    self.tokens[number] = _Token(token.kind, token.text, token.at, "&")
            elif token.python == "and" and waiting and waiting[-1] == depth:
                waiting.pop()
                self.tokens[number] = _Token(token.kind, token.text, token.at, "^")

    def _token_at(self, offset: int) -> _Token:
        return self.tokens[max(0, bisect.bisect_right(self._starts, offset) - 1)]

    def span(self, node: ast.AST) -> Span:
        """Where a node stands in the text."""
        begin, end = getattr(node, "col_offset", 0), getattr(node, "end_col_offset", 1)
        return self._token_at(begin).at[0], self._token_at(end - 1).at[1]

    def _origin(self, node: ast.Name) -> _Token:
        return self.tokens[int(node.id[1:])]

    # --- conditions

    def condition(self, node: ast.expr) -> Condition:
        self._deep += 1
        if self._deep > _DEEPEST:
            raise self.error(self.span(node), "the selection is nested too deeply here")
        try:
            return self._condition(node)
        finally:
            self._deep -= 1

    def _condition(self, node: ast.expr) -> Condition:
        at = self.span(node)
        match node:
            case ast.BoolOp(op=op, values=values):
                conditions = tuple(self.condition(value) for value in values)
                return tree.All(conditions, at) if isinstance(op, ast.And) else tree.Any(conditions, at)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return tree.Not(self.condition(operand), at)
            case ast.Compare():
                return self._comparison(node)
            case ast.BinOp(left=left, op=ast.BitOr(), right=ast.BinOp(left=low, op=ast.BitXor(), right=high)):
                return self._between(left, low, high, at)
            case ast.BinOp(left=ast.BinOp(left=left, op=ast.BitAnd(), right=low), op=ast.BitXor(), right=high):
                return tree.Not(self._between(left, low, high, at), at)
            case ast.BinOp(left=left, op=ast.MatMult(), right=right):
                return self._like(left, right, at)
            case ast.Call(func=ast.Name() as function, args=[argument]) if self._origin(function).text.lower() == "has":
                found = self._named(argument)
                return tree.Has(found, at)
        value = self.value(node)
        if isinstance(value, Field) and FIELDS[value.name] == "truth":
            return tree.Flag(value, at)
        shown = self.text[slice(*at)]
        how = (
            f"{shown} ~ 'x*' or has({shown})"
            if isinstance(value, Field) and self.kind(value) == "text"
            else f"{shown} > 0"
        )
        raise self.error(at, f"{shown} is a value and no condition; compare it, as in {how}")

    def _comparison(self, node: ast.Compare) -> Condition:
        found: list[Condition] = []
        left = node.left
        for op, right in zip(node.ops, node.comparators, strict=True):
            at = (self.span(left)[0], self.span(right)[1])
            if isinstance(op, ast.In | ast.NotIn):
                among = self._among(left, right, at)
                found.append(among if isinstance(op, ast.In) else tree.Not(among, at))
            else:
                sign = _COMPARISONS[type(op)]
                found.append(self._compare(sign, self.value(left), self.value(right), at))
            left = right
        return found[0] if len(found) == 1 else tree.All(tuple(found), self.span(node))

    def _compare(self, op: str, left: Value, right: Value, at: Span) -> tree.Compare:
        a, b = self.kind(left), self.kind(right)
        if b == "text" and isinstance(right, Constant) and a in ("bytes", "time"):
            right = self._read_constant(a, right)
        elif a == "text" and isinstance(left, Constant) and b in ("bytes", "time"):
            left = self._read_constant(b, left)
        elif {a, b} - {"text"} and {a, b} - {"number", "bytes"}:
            other = right if a == "text" else left
            raise self.error(other.at if "text" in (a, b) else at, _cannot_compare(a, b))
        if a == b == "text" and (op not in ("==", "!=") or isinstance(left, Constant) == isinstance(right, Constant)):
            raise self.error(
                at, "texts are compared with ==, !=, in or ~, one of run, name, id, reason, alias with a text in quotes"
            )
        return tree.Compare(op, left, right, at)  # type: ignore[arg-type]

    def _between(self, left: ast.expr, low: ast.expr, high: ast.expr, at: Span) -> tree.All:
        value = self.value(left)
        lower, upper = self.value(low), self.value(high)
        if isinstance(lower, Constant) and isinstance(upper, Constant) and _is_larger(lower, upper):
            raise self.error((lower.at[0], upper.at[1]), "between takes the smaller value first")
        return tree.All((self._compare(">=", value, lower, at), self._compare("<=", value, upper, at)), at)

    def _among(self, left: ast.expr, right: ast.expr, at: Span) -> tree.Among:
        value = self.value(left)
        nodes = right.elts if isinstance(right, ast.Tuple | ast.List) else [right]
        if not nodes:
            raise self.error(at, "in takes at least one number or text")
        options = []
        for node in nodes:
            option = self.value(node)
            if not isinstance(option, Constant):
                raise self.error(self.span(node), "in takes numbers or texts, as in (1, 2, 3)")
            compared = self._compare("==", value, option, at).right
            assert isinstance(compared, Constant)
            options.append(compared)
        return tree.Among(value, tuple(options), at)

    def _like(self, left: ast.expr, right: ast.expr, at: Span) -> tree.Like:
        field, pattern = self.value(left), self.value(right)
        if not isinstance(field, Field) or FIELDS[field.name] != "text":
            texts = ", ".join(name for name, kind in FIELDS.items() if kind == "text")
            raise self.error(self.span(left), f"~ compares a text with a pattern; texts are {texts}")
        if not isinstance(pattern, Constant) or not isinstance(pattern.value, str):
            raise self.error(self.span(right), '~ needs a pattern in quotes, such as "resnet50*"')
        return tree.Like(field, pattern.value, at)

    def _read_constant(self, kind: Kind, constant: Constant) -> Constant:
        text = str(constant.value)
        try:
            if kind == "bytes":
                return Constant(float(read_bytes("size", text)), constant.at)
            moment = datetime.fromisoformat(text)
            return Constant((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp(), constant.at)
        except (ValueError, OverflowError) as error:
            example = '"100 MB"' if kind == "bytes" else '"2026-03-01" or "2026-03-01T12:00"'
            raise self.error(
                constant.at, f"{text!r} cannot be compared here; write something like {example}"
            ) from error

    # --- values

    def value(self, node: ast.expr) -> Value:
        self._deep += 1
        if self._deep > _DEEPEST:
            raise self.error(self.span(node), "the selection is nested too deeply here")
        try:
            return self._value(node)
        finally:
            self._deep -= 1

    def _value(self, node: ast.expr) -> Value:
        at = self.span(node)
        match node:
            case ast.Constant(value=float() as number):
                return Constant(number, at)
            case ast.Name():
                return self._name(self._origin(node))
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=operand):
                value = self._number(operand)
                return self._negative(value, at) if isinstance(op, ast.USub) else value
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                sign = _ARITHMETIC[type(op)]
                a, b = self._number(left), self._number(right)
                if sign == "%" and not (_is_whole(a) and _is_whole(b)):
                    raise self.error(
                        at, "% takes whole numbers: epoch, step, sequence or size, and a number such as 10"
                    )
                return tree.Arithmetic(sign, a, b, at)
            case ast.Call(func=ast.Name() as function, args=[argument], keywords=[]):
                called = self._origin(function).text.lower()
                if called == "abs":
                    return tree.Arithmetic("abs", self._number(argument), None, at)
                if called == "metric":
                    return self._metric(argument)
        raise self._no_value(node, at)

    def _no_value(self, node: ast.expr, at: Span) -> ConfigError:
        """Why it is none."""
        what = self.text[slice(*at)]
        if isinstance(node, ast.Compare | ast.BoolOp | ast.UnaryOp):
            return self.error(at, "a condition stands where a value should; put it into parentheses, or leave it out")
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr | ast.BitXor | ast.BitAnd):
            return self.error(at, "between takes two values, as in epoch between 10 and 20")
        return self.error(at, f"{what} has no meaning in a selection; functions are has(x), abs(x) and metric('name')")

    @staticmethod
    def _negative(value: Value, at: Span) -> Value:
        if isinstance(value, Constant):
            assert isinstance(value.value, float)
            return Constant(-value.value, at)
        return tree.Arithmetic("neg", value, None, at)

    def _number(self, node: ast.expr) -> Value:
        value = self.value(node)
        if self.kind(value) not in ("number", "bytes"):
            raise self.error(self.span(node), f"{self.text[slice(*self.span(node))]} is no number")
        return value

    def _name(self, token: _Token) -> Value:
        if token.kind == "text":
            if _ODD_ESCAPE.search(token.text.replace("\\\\", "")):
                raise self.error(token.at, "in a text, \\ stands only before a quote or another \\")
            return Constant(re.sub(r"\\(.)", r"\1", token.text[1:-1], flags=re.DOTALL), token.at)
        if token.kind == "quoted":
            return Metric(check_metric(token.text[1:-1]), token.at)
        return Field(token.text, token.at) if token.text in FIELDS else Metric(token.text, token.at)

    def _metric(self, node: ast.expr) -> Metric:
        value = self.value(node)
        if not isinstance(value, Constant) or not isinstance(value.value, str):
            raise self.error(self.span(node), "metric() takes a name in quotes, such as metric('val/loss')")
        return Metric(check_metric(value.value), value.at)

    def _named(self, node: ast.expr) -> Field | Metric:
        value = self.value(node)
        if isinstance(value, Constant) and isinstance(value.value, str):
            return Metric(check_metric(value.value), value.at)
        if not isinstance(value, Field | Metric):
            raise self.error(self.span(node), "has() takes the name of a metric or field")
        return value

    def kind(self, value: Value) -> Kind:
        """What a value is."""
        if isinstance(value, Constant):
            return "text" if isinstance(value.value, str) else "number"
        return FIELDS[value.name] if isinstance(value, Field) else "number"


_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
}
_ARITHMETIC: dict[type[ast.operator], Literal["+", "-", "*", "/", "%"]] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.Mod: "%",
}


def _is_whole(value: Value) -> bool:
    if isinstance(value, Constant):
        return isinstance(value.value, float) and value.value.is_integer() and abs(value.value) < 2**53
    return isinstance(value, Field) and value.name in tree.WHOLE_NUMBERS


def _is_larger(one: Constant, other: Constant) -> bool:
    return isinstance(one.value, float) and isinstance(other.value, float) and one.value > other.value


def _cannot_compare(a: Kind, b: Kind) -> str:
    if "truth" in (a, b):
        return "this is true or false by itself: write pinned, or not pinned"
    if "time" in (a, b):
        return 'a time is compared with a date in quotes, such as created > "2026-03-01"'
    if "text" in (a, b):
        return "a text is compared with a text in quotes, a number with a number"
    return f"a {a} cannot be compared with a {b}"


def parse(text: str) -> Query:
    """Read a selection.

    Raises:
        ConfigError: it is none; the message points at the character.

    Example:
        >>> parse("acc > 0.7 and not pinned").clauses[1]
        Not(condition=Flag(field=Field(name='pinned', at=(18, 24)), at=(18, 24)), at=(14, 24))
    """
    reader = _Reader(text)
    found = reader.python()
    return Query(text, None if found is None else reader.condition(found))


def parse_key(text: str) -> Field | Metric:
    """What to rank by: a metric, or a field that can be ordered.

    Raises:
        ConfigError: it is neither.

    Example:
        >>> parse_key("val/loss").name
        'val/loss'
    """
    if text in FIELDS:
        if FIELDS[text] in ("text", "truth"):
            raise ConfigError(f"{text} is no number to rank by; give a metric, epoch, step, sequence, size or created")
        return Field(text, (0, len(text)))
    return Metric(check_metric(text), (0, len(text)))
