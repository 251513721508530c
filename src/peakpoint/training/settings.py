"""The settings that a training was given, as plain values, and how they differ from those before."""

import argparse
import dataclasses
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

import msgspec

from peakpoint.errors import ConfigError
from peakpoint.format.names import check_text, listing
from peakpoint.format.settings import Settings, flat_items
from peakpoint.state.json_scalars import kind_of

_DEEPEST = 20  # dicts and lists in one another
_LONGEST_NAME = 200  # characters
_MOST_BYTES = 64 * 1024  # they stand in the journal once for each start of the training
_SHOWN = 10  # changes in one message
_LONGEST_SHOWN = 60  # characters of a value


def read_settings(config: object, tags: Iterable[str] | None) -> Settings:
    """Return settings as plain values.

    Args:
        config: a mapping, an ``argparse.Namespace`` or an instance of a dataclass; None for none.
        tags: words; None for none.

    Raises:
        ConfigError: something that cannot be kept; the message says what and where.
    """
    members = {} if config is None else _members(config)
    if members is None:
        raise ConfigError(
            f"config= takes a dict, an argparse.Namespace or a dataclass instance, not a {kind_of(config)}"
        )
    settings = Settings(_plain_dict(members, "config", 1), _read_tags(tags))
    size = len(msgspec.json.encode(dataclasses.asdict(settings)))
    if size > _MOST_BYTES:
        raise ConfigError(
            f"config= and tags= take {size:,} bytes, and {_MOST_BYTES:,} are kept at most: leave out what is long, or "
            "save it as a part of the state"
        )
    _check_names(settings.config)
    return settings


def _members(value: object) -> Mapping[Any, Any] | None:
    """Return the members of what has named ones; None for everything else."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, argparse.Namespace):
        return vars(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {member.name: getattr(value, member.name) for member in dataclasses.fields(value)}
    return None


def _plain_dict(members: Mapping[Any, Any], where: str, depth: int) -> dict[str, Any]:
    settings = {}
    for name, value in members.items():
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{where} has the key {name!r}: names of settings are texts, and not empty")
        settings[str(check_text(f"a key of {where}", name))] = _plain(value, f"{where}.{name}", depth)
    return settings


def _plain(value: Any, where: str, depth: int) -> Any:
    """Return a value as JSON has it; exactly, or not at all."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # of NumPy, or of a tensor
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(check_text(where, value))
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    members = _members(value)
    if depth < _DEEPEST and members is not None:
        return _plain_dict(members, where, depth + 1)
    if depth < _DEEPEST and isinstance(value, list | tuple):
        return [_plain(child, f"{where}[{number}]", depth + 1) for number, child in enumerate(value)]
    raise ConfigError(f"{where} {_problem(value, members)}; leave it out, or give it as a text")


def _problem(value: Any, members: object) -> str:
    if members is not None or isinstance(value, list | tuple):
        return f"is nested more than {_DEEPEST} deep"
    if isinstance(value, int | float):
        return f"is {str(value)[:40]}: numbers are finite, and whole ones have 64 bits at most"
    return f"is a {kind_of(value)}: settings are numbers, texts, true, false, None, and lists and dicts of these"


def _check_names(config: Mapping[str, Any]) -> None:
    """Refuse two settings of one name, and names that are too long."""
    names = Counter(name for name, _ in flat_items(config))
    for name, count in names.items():
        if count > 1:
            raise ConfigError(f"config has two settings {name!r}, one of them in a dict; rename one")
        if len(name) > _LONGEST_NAME:
            raise ConfigError(f"the setting {name[:40]!r}... has a name of more than {_LONGEST_NAME} characters")


def _read_tags(tags: Iterable[str] | None) -> tuple[str, ...]:
    if isinstance(tags, str | bytes) or not isinstance(tags, Iterable | None):
        raise ConfigError(f"tags= takes several texts: give tags=[{tags!r}]")
    texts = [check_text("a tag", tag) for tag in tags or ()]
    for text in texts:
        if not text.strip() or len(text) > _LONGEST_NAME:
            raise ConfigError(f"{text[:40]!r} is no tag: a tag has 1 to {_LONGEST_NAME} characters, such as 'ablation'")
    return tuple(dict.fromkeys(texts))


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def changes(earlier: Settings, new: Settings) -> str:
    """Say which settings differ, with both values; nothing where none do, or none were given earlier or now."""
    sentences = []
    if earlier.config and new.config:
        earlier_texts, texts = earlier.texts(), new.texts()
        names = [name for name in dict.fromkeys([*earlier_texts, *texts]) if earlier_texts.get(name) != texts.get(name)]
        values = [(earlier_texts.get(name, "not set"), texts.get(name, "not set")) for name in names]
        sentences = [
            f"config.{_short(name)} {_short(old_value)} -> {_short(value)}"
            for name, (old_value, value) in zip(names, values, strict=True)
        ]
    if earlier.tags and new.tags and earlier.tags != new.tags:
        sentences.append(f"tags {_short(', '.join(earlier.tags))} -> {_short(', '.join(new.tags))}")
    return listing(sentences, _SHOWN)
