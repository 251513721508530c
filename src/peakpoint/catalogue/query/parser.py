"""Read a selection: from tokens to a tree.

Precedence, the loosest first: or, and, not, comparisons, + and -, * / %, signs.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime

from peakpoint.catalogue.query import tree
from peakpoint.catalogue.query.tokens import QUOTE_AMOUNTS, Token, pointed_error, tokens_of
from peakpoint.catalogue.query.tree import (
    FIELDS,
    Condition,
    Constant,
    Field,
    Kind,
    Metric,
    Query,
    Setting,
    Span,
    Value,
)
from peakpoint.errors import ConfigError
from peakpoint.format.amounts import read_bytes
from peakpoint.format.names import check_metric, did_you_mean
from peakpoint.format.settings import SETTING

_ODD_ESCAPE = re.compile(r"\\[^\"']")
_DEEPEST = 40
_QUOTE_PATTERNS = '; a pattern stands in quotes, as in run ~ "resnet50*"'
_Node = Condition | Value
_COMPARISONS = ("<", "<=", ">", ">=", "==", "!=")
_CLOSING = {"(": ")", "[": "]"}


class _Parser:
    """Reads one text; see ``parse``."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = tokens_of(text)
        self._position = 0
        self._depth = 0

    @property
    def _next(self) -> Token:
        return self._tokens[self._position]

    def _take(self) -> Token:
        token = self._next
        if token.kind == "end":
            raise self._not_understood()
        self._position += 1
        return token

    def _accept(self, *texts: str) -> bool:
        """Pass over these tokens, if they come next."""
        tokens = self._tokens[self._position : self._position + len(texts)]
        is_next = tuple(token.text for token in tokens if token.kind in ("word", "sign")) == texts
        self._position += len(texts) if is_next else 0
        return is_next

    def _since(self, begin: int) -> Span:
        """From a character to the end of the last token that was taken."""
        return begin, self._tokens[self._position - 1].span[1]

    def _error(self, span: Span, message: str) -> ConfigError:
        return pointed_error(self._text, span, message)

    def _not_understood(self) -> ConfigError:
        """Why the next token cannot stand there."""
        token = self._next
        around = self._tokens[max(0, self._position - 2) : self._position + 1]
        if token.kind == "end":
            around = self._tokens[:-1][-3:]
        hint = ""
        if token.text == ")":
            hint = ": parentheses do not match"
        elif any(near.text == "~" for near in around) and around[-1].kind != "text":
            hint = _QUOTE_PATTERNS
        elif [near.kind for near in around[-2:]] == ["number", "name"]:
            hint = QUOTE_AMOUNTS
        return self._error(token.span, f"the selection is not understood here{hint}")

    @contextmanager
    def _nested(self, token: Token) -> Iterator[None]:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._error(token.span, "the selection is nested too deeply here; write it with fewer parentheses")
        yield
        self._depth -= 1

    # --- conditions

    def query(self) -> Condition | None:
        """The condition of the whole text; None for an empty one."""
        if self._next.kind == "end":
            return None
        node = self._any()
        if self._next.kind != "end":
            raise self._not_understood()
        return self._as_condition(node)

    def _any(self) -> _Node:
        return self._joined("or", self._all, tree.Any)

    def _all(self) -> _Node:
        return self._joined("and", self._not, tree.All)

    def _joined(self, word: str, operand: Callable[[], _Node], kind: type[tree.All | tree.Any]) -> _Node:
        begin = self._next.span[0]
        nodes = [operand()]
        while self._accept(word):
            nodes.append(operand())
        if len(nodes) == 1:
            return nodes[0]
        return kind(tuple(map(self._as_condition, nodes)), self._since(begin))

    def _not(self) -> _Node:
        token = self._next
        if not self._accept("not"):
            return self._comparison()
        with self._nested(token):
            condition = self._as_condition(self._not())
        return tree.Not(condition, self._since(token.span[0]))

    def _comparison(self) -> _Node:
        begin = self._next.span[0]
        node = self._sum()
        for word, read in (("~", self._like), ("in", self._among), ("between", self._between)):
            negated = word != "~" and self._accept("not", word)
            if negated or self._accept(word):
                condition = read(self._as_value(node), begin)
                return tree.Not(condition, condition.span) if negated else condition
        conditions: list[Condition] = []
        while self._next.kind == "sign" and self._next.text in _COMPARISONS:
            op, lower = self._take().text, self._as_value(node)
            node = self._sum()
            upper = self._as_value(node)
            conditions.append(self._compare(op, lower, upper, (lower.span[0], upper.span[1])))
        if not conditions:
            return node
        return conditions[0] if len(conditions) == 1 else tree.All(tuple(conditions), self._since(begin))

    def _compare(self, op: str, left: Value, right: Value, span: Span) -> tree.Compare:
        kind, other_kind = _kind(left), _kind(right)
        kinds = {kind, other_kind}
        if other_kind == "text" and isinstance(right, Constant) and kind in ("bytes", "time"):
            right = self._amount(kind, right)
        elif kind == "text" and isinstance(left, Constant) and other_kind in ("bytes", "time"):
            left = self._amount(other_kind, left)
        elif kinds - {"text"} and kinds - {"number", "bytes"} and not _fits_setting(left, right):
            not_text = right if kind == "text" else left
            message = _cannot_compare(kind, other_kind)
            if "text" in kinds and isinstance(not_text, Metric):
                hint = did_you_mean(not_text.name, list(FIELDS))
                message += f": {not_text.name!r} is taken for a metric{hint}"
            raise self._error(not_text.span if "text" in kinds else span, message)
        if (
            kinds <= {"text", "setting"}
            and "text" in kinds
            and (op not in ("==", "!=") or isinstance(left, Constant) == isinstance(right, Constant))
        ):
            raise self._error(
                span,
                "texts are compared with ==, !=, in or ~, one of run, name, id, reason, alias, tag or a setting with a "
                "text in quotes",
            )
        return tree.Compare(op, left, right, span)  # type: ignore[arg-type]

    def _between(self, value: Value, begin: int) -> tree.All:
        lower = self._as_value(self._sum())
        if not self._accept("and"):
            raise self._error(self._since(begin), "between takes two values, as in epoch between 10 and 20")
        upper = self._as_value(self._sum())
        span = self._since(begin)
        if _is_larger(lower, upper):
            raise self._error((lower.span[0], upper.span[1]), "between takes the smaller value first")
        bounds = (self._compare(">=", value, lower, span), self._compare("<=", value, upper, span))
        return tree.All(bounds, span)

    def _among(self, value: Value, begin: int) -> tree.Among:
        nodes = self._list() if self._next.text in _CLOSING else [self._sum()]
        span = self._since(begin)
        if not nodes:
            raise self._error(span, "in takes at least one number or text")
        options = []
        for node in nodes:
            option = self._as_value(node)
            if not isinstance(option, Constant):
                raise self._error(option.span, "in takes numbers or texts, as in (1, 2, 3)")
            constant = self._compare("==", value, option, span).right
            assert isinstance(constant, Constant)
            options.append(constant)
        if len({isinstance(option.value, str) for option in options}) > 1:
            raise self._error(span, "in takes numbers or texts, and not both")
        return tree.Among(value, tuple(options), span)

    def _list(self) -> list[_Node]:
        closing = _CLOSING[self._take().text]
        nodes: list[_Node] = []
        while not self._accept(closing):
            nodes.append(self._sum())
            if not self._accept(",") and self._next.text != closing:
                raise self._not_understood()
        return nodes

    def _like(self, value: Value, begin: int) -> tree.Like:
        pattern = self._as_value(self._sum())
        if not isinstance(value, Field | Setting) or _kind(value) not in ("text", "setting"):
            texts = ", ".join(name for name, kind in FIELDS.items() if kind == "text")
            raise self._error(value.span, f"~ compares a text with a pattern; texts are {texts} and settings")
        if not isinstance(pattern, Constant) or not isinstance(pattern.value, str):
            raise self._error(pattern.span, '~ needs a pattern in quotes, such as "resnet50*"')
        return tree.Like(value, pattern.value, self._since(begin))

    def _as_condition(self, node: _Node) -> Condition:
        if not isinstance(node, Value):
            return node
        if isinstance(node, Setting) or (isinstance(node, Field) and FIELDS[node.name] == "truth"):
            return tree.Flag(node, node.span)
        text = self._text[slice(*node.span)]
        is_text = isinstance(node, Field) and _kind(node) == "text"
        example = f"{text} ~ 'x*' or has({text})" if is_text else f"{text} > 0"
        raise self._error(node.span, f"{text} is a value and not a condition; compare it, as in {example}")

    # --- values

    def _sum(self) -> _Node:
        return self._arithmetic(("+", "-"), self._product)

    def _product(self) -> _Node:
        return self._arithmetic(("*", "/", "%"), self._signed)

    def _arithmetic(self, operators: tuple[str, ...], operand: Callable[[], _Node]) -> _Node:
        begin = self._next.span[0]
        node = operand()
        while self._next.kind == "sign" and self._next.text in operators:
            op, second = self._take().text, operand()
            operands = self._number(node), self._number(second)
            span = self._since(begin)
            if op == "%" and not all(map(_is_whole, operands)):
                message = "% takes whole numbers: epoch, step, sequence or size, and a number such as 10"
                raise self._error(span, message)
            node = tree.Arithmetic(op, *operands, span)  # type: ignore[arg-type]
        return node

    def _signed(self) -> _Node:
        token = self._next
        if not (self._accept("-") or self._accept("+")):
            return self._primary()
        with self._nested(token):
            value = self._number(self._signed())
        span = self._since(token.span[0])
        if token.text == "+":
            return replace(value, span=span)
        if isinstance(value, Constant):
            assert isinstance(value.value, float)
            return Constant(-value.value, span)
        return tree.Arithmetic("neg", value, None, span)

    def _primary(self) -> _Node:
        token = self._take()
        match token.kind:
            case "number":
                return Constant(float(token.text), token.span)
            case "text":
                return Constant(self._unescaped(token), token.span)
            case "name" | "quoted" if self._next.text == "(":
                return self._call(token)
            case "name" if token.text.startswith(SETTING):
                return Setting(token.text, token.span)
            case "name":
                return Field(token.text, token.span) if token.text in FIELDS else Metric(token.text, token.span)
            case "quoted":
                return Metric(check_metric(token.text[1:-1]), token.span)
        if token.text == "(":
            return self._in_parentheses(token)
        if token.text == "[":
            raise self._error(token.span, "[ has no meaning in a selection, except after in")
        self._position -= 1
        raise self._not_understood()

    def _in_parentheses(self, opening: Token) -> _Node:
        with self._nested(opening):
            node = self._any()
        if self._next.kind == "end":
            raise self._error(opening.span, "the selection is not understood here: parentheses do not match")
        if not self._accept(")"):
            raise self._not_understood()
        return node

    def _call(self, function: Token) -> _Node:
        argument = self._in_parentheses(self._take())
        span = self._since(function.span[0])
        match function.text.lower():
            case "has":
                return tree.Has(self._named(argument), span)
            case "abs":
                return tree.Arithmetic("abs", self._number(argument), None, span)
            case "metric" | "config" as kind:
                if not isinstance(argument, Constant) or not isinstance(argument.value, str):
                    example = "metric('val/loss')" if kind == "metric" else "config('weight-decay')"
                    raise self._error(argument.span, f"{kind}() takes a name in quotes, such as {example}")
                name = argument.value
                return Setting(SETTING + name, span) if kind == "config" else Metric(check_metric(name), span)
        functions = "has(x), abs(x), metric('name') and config('name')"
        message = f"{function.text} has no meaning in a selection; functions are {functions}"
        raise self._error(span, message)

    def _named(self, node: _Node) -> Field | Metric | Setting:
        value = self._as_value(node)
        if isinstance(value, Constant) and isinstance(value.value, str):
            return Metric(check_metric(value.value), value.span)
        if not isinstance(value, Field | Metric | Setting):
            raise self._error(value.span, "has() takes the name of a metric, field or setting")
        return value

    def _unescaped(self, token: Token) -> str:
        if _ODD_ESCAPE.search(token.text.replace("\\\\", "")):
            raise self._error(token.span, "in a text, \\ stands only before a quote or another \\")
        return re.sub(r"\\(.)", r"\1", token.text[1:-1], flags=re.DOTALL)

    def _as_value(self, node: _Node) -> Value:
        if isinstance(node, Value):
            return node
        raise self._error(
            node.span, "a condition stands where a value should; put it into parentheses, or leave it out"
        )

    def _number(self, node: _Node) -> Value:
        value = self._as_value(node)
        if _kind(value) not in ("number", "bytes", "setting"):
            raise self._error(value.span, f"{self._text[slice(*value.span)]} is not a number")
        return value

    def _amount(self, kind: Kind, constant: Constant) -> Constant:
        """A size or a time that is written as a text."""
        text = str(constant.value)
        try:
            if kind == "bytes":
                return Constant(float(read_bytes("size", text)), constant.span)
            moment = datetime.fromisoformat(text)
            return Constant((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp(), constant.span)
        except (ValueError, OverflowError) as error:
            example = '"100 MB"' if kind == "bytes" else '"2026-03-01" or "2026-03-01T12:00"'
            message = f"{text!r} cannot be compared here; write something like {example}"
            raise self._error(constant.span, message) from error


def _kind(value: Value) -> Kind:
    """What a value is."""
    if isinstance(value, Constant):
        return "text" if isinstance(value.value, str) else "number"
    if isinstance(value, Setting):
        return "setting"
    return FIELDS[value.name] if isinstance(value, Field) else "number"


def _fits_setting(*values: Value) -> bool:
    """Whether a setting is compared with a text in quotes or with numbers, which other settings are then, too."""
    operands = [value for value in values if not isinstance(value, Setting)]
    return len(operands) < 2 and all(
        _kind(operand) in ("number", "bytes") or (_kind(operand) == "text" and isinstance(operand, Constant))
        for operand in operands
    )


def _is_whole(value: Value) -> bool:
    if isinstance(value, Constant):
        return isinstance(value.value, float) and value.value.is_integer() and abs(value.value) < 2**53
    return isinstance(value, Field) and value.name in tree.WHOLE_NUMBERS


def _is_larger(lower: Value, upper: Value) -> bool:
    """Whether two bounds are numbers in the wrong order."""
    bounds = [value.value for value in (lower, upper) if isinstance(value, Constant)]
    numbers = [bound for bound in bounds if isinstance(bound, float)]
    return len(numbers) == 2 and numbers[0] > numbers[1]


def _cannot_compare(kind: Kind, other_kind: Kind) -> str:
    if "truth" in (kind, other_kind):
        return "this is true or false by itself: write pinned, or not pinned"
    if "time" in (kind, other_kind):
        return 'a time is compared with a date in quotes, such as created > "2026-03-01"'
    if "text" in (kind, other_kind):
        return "a text is compared with a text in quotes, a number with a number"
    return f"a {kind} cannot be compared with a {other_kind}"


def parse(text: str) -> Query:
    """Read a selection.

    Raises:
        ConfigError: it cannot be read; the message points at the character.

    Example:
        >>> parse("acc > 0.7 and not pinned").clauses[1]
        Not(condition=Flag(field=Field(name='pinned', span=(18, 24)), span=(18, 24)), span=(14, 24))
    """
    return Query(text, _Parser(text).query())


def parse_key(text: str) -> Field | Metric:
    """Read what to rank by: a metric, or a field that can be ordered.

    Raises:
        ConfigError: it is neither.

    Example:
        >>> parse_key("val/loss").name
        'val/loss'
    """
    span = (0, len(text))
    if text not in FIELDS:
        return Metric(check_metric(text), span)
    if FIELDS[text] in ("text", "truth"):
        raise ConfigError(f"{text} is not a number to rank by; give a metric, epoch, step, sequence, size or created")
    return Field(text, span)
