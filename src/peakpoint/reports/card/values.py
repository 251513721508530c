"""The content of a model card."""

from collections.abc import Mapping
from dataclasses import dataclass

from peakpoint.format.events import Measured
from peakpoint.format.manifest import Manifest
from peakpoint.reports.evaluation.run_data import RunData
from peakpoint.repository.aliases import AliasRecord
from peakpoint.repository.signing import Signature
from peakpoint.repository.validations import Validation
from peakpoint.rules import Claim

MARK = "<!-- peakpoint card -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """What only a person can say of a model.

    Attributes:
        license: such as ``"apache-2.0"``; the Hub knows these by identifiers.
        data: the data that it was trained and evaluated on.
        task: such as ``"image-classification"``, as the Hub calls it.
        base_model: the model on the Hub that it was made from.
        about: the user's own Markdown, put in unchanged.
    """

    license: str | None = None
    data: str | None = None
    task: str | None = None
    base_model: str | None = None
    tags: tuple[str, ...] = ()
    about: str = ""


@dataclass(frozen=True, slots=True)
class AliasPeriod:
    """A time during which an alias pointed at the checkpoint.

    Attributes:
        record: the change of the alias that began it.
        previous: the readable record before it; None for the first.
        following: the next readable record; None when there is none.
        is_current: whether the alias points at the checkpoint now.
    """

    record: AliasRecord
    previous: AliasRecord | None
    following: AliasRecord | None
    is_current: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """All that is recorded of one checkpoint.

    Attributes:
        location: of the repository.
        manifest: without the parts that were dropped since.
        manifest_digest: of the bytes of its manifest.
        claims: why it is kept.
        metrics: the last known value of each.
        measured: the measurements made after it was saved.
        state: part to the class of the object that was saved.
        lineage: its ancestors, the nearest first, and whether each exists.
        validations: earliest first.
        signatures: the newest first; none is verified here.
        alias_periods: when aliases pointed at it, by alias.
        damage: a sentence for each record that could not be read.
    """

    location: str
    manifest: Manifest
    manifest_digest: str
    run_data: RunData
    claims: tuple[Claim, ...]
    metrics: Mapping[str, float]
    measured: tuple[Measured, ...]
    state: Mapping[str, str]
    lineage: tuple[tuple[str, bool], ...]
    validations: tuple[Validation, ...]
    signatures: tuple[Signature, ...]
    alias_periods: tuple[AliasPeriod, ...]
    damage: tuple[str, ...]
    description: ModelDescription

    @property
    def validation(self) -> Validation | None:
        """The last readable validation."""
        return self.validations[-1] if self.validations else None

    @property
    def evaluated(self) -> Mapping[str, float]:
        """The metrics of the last validation; empty without one."""
        return {} if self.validation is None else self.validation.metrics

    @property
    def measured_later(self) -> Mapping[str, float]:
        """The last measured value of each metric."""
        return {name: value for event in self.measured for name, value in event.metrics.items()}

    @property
    def current_aliases(self) -> list[str]:
        """The aliases that point at it now."""
        return [period.record.alias for period in self.alias_periods if period.is_current]
