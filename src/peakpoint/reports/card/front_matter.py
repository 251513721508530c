"""The front matter of a card, in the schema of the Hugging Face Hub."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from peakpoint.reports.card.values import ModelCard

_DATASET = re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+")  # on the Hub
_WORD = re.compile(r"(?!(?:true|false|yes|no|on|off|null|y|n)\Z)[A-Za-z][A-Za-z0-9_-]*", re.IGNORECASE)


def front_matter(card: ModelCard) -> dict[str, Any]:
    """Return the members of the front matter; metrics that are not finite are left out.

    Source: https://github.com/huggingface/hub-docs/blob/main/modelcard.md
    """
    description = card.description
    metrics = {name: value for name, value in {**card.metrics, **card.evaluated}.items() if math.isfinite(value)}
    is_dataset = _DATASET.fullmatch(description.data or "")
    members = {
        "library_name": "pytorch",
        "license": description.license,
        "base_model": description.base_model,
        "pipeline_tag": description.task,
        "tags": list(dict.fromkeys(["peakpoint", *description.tags])),
        "datasets": [description.data] if is_dataset else [],
        "metrics": list(metrics),
        "model-index": [{"name": card.manifest.run, "results": [_result(card, metrics)]}] if metrics else [],
    }
    return {name: value for name, value in members.items() if value}


def _result(card: ModelCard, metrics: Mapping[str, float]) -> dict[str, Any]:
    data = card.description.data or "not recorded"
    return {
        "task": {"type": card.description.task or "other"},
        "dataset": {"name": data, "type": re.sub(r"[^a-z0-9]+", "-", data.lower()).strip("-") or "other"},
        "metrics": [
            {"type": name, "value": value, "name": f"{name} ({_source(card, name)})"} for name, value in metrics.items()
        ],
    }


def _source(card: ModelCard, metric: str) -> str:
    if metric in card.evaluated:
        return "evaluated again in its validation"
    return "measured later" if metric in card.measured_later else "reported in training"


def yaml(value: Mapping[str, Any]) -> str:
    r"""A mapping of plain values as YAML: blocks of keys and lists, every text in double quotes.

    Example:
        >>> print(yaml({"name": "a: b", "numbers": [1, 1e-05], "of": [{"x": {"why": "é\x85"}}]}), end="")
        name: "a: b"
        numbers:
        - 1
        - 1.0e-05
        of:
        - x:
            why: "é\U00000085"
    """
    return "".join(f"{line}\n" for line in _lines(value))


def _lines(value: Mapping[str, Any]) -> Iterator[str]:
    for key, child in value.items():
        name = key if _WORD.fullmatch(key) else _quoted(key)
        if isinstance(child, Mapping):
            yield f"{name}:"
            yield from (f"  {line}" for line in _lines(child))
        elif isinstance(child, list):
            yield f"{name}:"
            for one in child:
                inner = list(_lines(one)) if isinstance(one, Mapping) else [_scalar(one)]
                yield f"- {inner[0]}"
                yield from (f"  {line}" for line in inner[1:])
        else:
            yield f"{name}: {_scalar(child)}"


def _scalar(value: Any) -> str:
    if isinstance(value, float):
        mantissa, e, exponent = repr(value).partition("e")
        return f"{mantissa}.0{e}{exponent}" if e and "." not in mantissa else repr(value)  # 1e-05 is a text in YAML 1.1
    return _quoted(value) if isinstance(value, str) else json.dumps(value)


def _quoted(text: str) -> str:
    """JSON's quoting is YAML's, but for what YAML takes for a line break or does not allow."""
    plain = json.dumps(text, ensure_ascii=False)
    if plain.isprintable():
        return plain
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in plain)
