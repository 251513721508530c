"""Cut the text of a selection into words and signs."""

import re
from dataclasses import dataclass

from peakpoint.catalogue.query.tree import Span, point
from peakpoint.errors import ConfigError

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
_WORDS = ("and", "or", "not", "in", "between")
_SYNONYMS = {"=": "==", "<>": "!="}
_FOREIGN = dict.fromkeys(("is", "null", "none", "nan"), "ask with has(x) or not has(x)")
_FOREIGN |= dict.fromkeys(("true", "false"), "write pinned or not pinned, for example")
_FOREIGN |= {"like": 'write name ~ "pattern*"'}
_INSTEAD = {"&": "; write and", "|": "; write or", "!": "; write not"}
QUOTE_AMOUNTS = '; sizes and dates stand in quotes, as in size < "40 MB"'
_MOST_TOKENS = 2000
_LONGEST = 50_000


@dataclass(frozen=True, slots=True)
class Token:
    """A word or sign; ``kind`` is a group of ``_TOKEN``, ``word`` or ``end``."""

    kind: str
    text: str
    span: Span


def pointed_error(text: str, span: Span, message: str) -> ConfigError:
    """An error that points at a part of a selection."""
    return ConfigError(point(text, span, message))


def tokens_of(text: str) -> list[Token]:
    """Cut a text into tokens; the last is its end."""
    if len(text) > _LONGEST:
        raise ConfigError(f"the selection is too long: more than {_LONGEST:,} characters")
    tokens: list[Token] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or match.lastgroup is None:
            raise _no_token(text, position)
        if not match[0].isascii() and any("\ud800" <= character <= "\udfff" for character in match[0]):
            raise pointed_error(text, match.span(), "the selection contains broken bytes, which are not text")
        position = match.end()
        if match.lastgroup != "space":
            tokens.append(_token(text, match.lastgroup, match.span()))
    if len(tokens) > _MOST_TOKENS:
        raise ConfigError(f"the selection is too long: more than {_MOST_TOKENS} words and signs")
    end = tokens[-1].span[1] if tokens else 0
    return [*tokens, Token("end", "", (end, end + 1))]


def _token(text: str, kind: str, span: Span) -> Token:
    """A token with synonyms resolved; texts and quoted names keep their quotes."""
    written = text[slice(*span)]
    word = written.lower()
    if kind == "name" and word in _FOREIGN:
        raise pointed_error(text, span, f"{written} has no meaning in a selection; {_FOREIGN[word]}")
    if kind == "name" and word in _WORDS:
        return Token("word", word, span)
    return Token(kind, _SYNONYMS.get(written, written), span)


def _no_token(text: str, position: int) -> ConfigError:
    """Why no token begins here."""
    character = text[position]
    if character in "\"'`":
        return pointed_error(text, (position, len(text)), f"the closing {character} is missing")
    hint = QUOTE_AMOUNTS if character.isdigit() else _INSTEAD.get(character, "")
    return pointed_error(text, (position, position + 1), f"{character!r} has no meaning in a selection{hint}")
