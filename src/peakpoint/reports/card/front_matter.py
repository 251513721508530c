"""The front matter of a card, in the schema of the Hugging Face Hub."""

import math
import re
from collections.abc import Mapping
from typing import Any

from peakpoint.reports.card.values import ModelCard

_DATASET = re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+")  # on the Hub


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
