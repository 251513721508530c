"""Settings of a run: what its training was started with, for people, reports and selections."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from peakpoint.format.events import Event, Opened

SETTING = "config."
"""How the names of settings begin, wherever they stand beside those of metrics."""
Setting = str | int | float | bool | None
"""A single setting; a list is a text, as JSON."""

_DEEPEST = 20  # dicts in dicts; what is deeper in a record of somebody else is shown as JSON


@dataclass(frozen=True, slots=True)
class Settings:
    """What a training was started with.

    Attributes:
        config: plain values by name, also in dicts; as it was given.
        tags: words, in their order.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()

    def flat(self) -> dict[str, Setting]:
        """Return each setting by its name; names in dicts are joined with dots.

        Example:
            >>> Settings({"lr": 0.1, "optimizer": {"name": "adamw", "betas": [0.9, 0.99]}}).flat()
            {'lr': 0.1, 'optimizer.name': 'adamw', 'optimizer.betas': '[0.9, 0.99]'}
        """
        return dict(flat_items(self.config))

    def texts(self) -> dict[str, str]:
        """Return each setting as people read it, by its name."""
        return {name: setting_text(value) for name, value in self.flat().items()}


def flat_items(config: Mapping[str, Any], prefix: str = "", depth: int = 1) -> Iterator[tuple[str, Setting]]:
    """Yield the name and the value of each setting; see ``Settings.flat``."""
    for name, value in config.items():
        if isinstance(value, Mapping) and depth < _DEEPEST:
            yield from flat_items(value, f"{prefix}{name}.", depth + 1)
        else:
            is_text = isinstance(value, Mapping | list | tuple)
            yield prefix + name, json.dumps(value, ensure_ascii=False) if is_text else value


def setting_text(value: Setting) -> str:
    """Return a setting as people read it.

    Example:
        >>> [setting_text(value) for value in (0.1, 1.0, True, None, "sgd")]
        ['0.1', '1', 'true', 'none', 'sgd']
    """
    return value if isinstance(value, str) else str(value).lower().removesuffix(".0")


def settings_of(events: Iterable[Event]) -> Settings:
    """Return the settings that count: those given last; an opening of the run that gives none leaves them."""
    config: Mapping[str, Any] = {}
    tags: tuple[str, ...] = ()
    for event in events:
        if isinstance(event, Opened):
            config, tags = event.config or config, event.tags or tags
    return Settings(config, tags)
