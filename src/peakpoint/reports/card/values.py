"""What a card is made of."""

from collections.abc import Mapping
from dataclasses import dataclass

from peakpoint.format.events import Measured
from peakpoint.format.manifest import Manifest
from peakpoint.reports.evaluation.run_data import RunData
from peakpoint.repository.aliases import AliasRecord
from peakpoint.repository.signing import Signature
from peakpoint.repository.validations import Validation
from peakpoint.rules import Claim


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """What only a person can say of a model.

    Attributes:
        license: such as ``"apache-2.0"``; the Hub knows these by identifiers.
        data: what it was trained and evaluated on.
        task: such as ``"image-classification"``, as the Hub calls it.
        base_model: the model on the Hub that it was made of.
        tags: further tags.
        about: Markdown of the user, put in as it is.
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
        record: which made it so.
        before: the record in front of it that can be read; None for the first.
        after: the next one that can be read; None when there is none.
        holds: whether the alias points at it now.
    """

    record: AliasRecord
    before: AliasRecord | None
    after: AliasRecord | None
    holds: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """All that is recorded of one checkpoint.

    Attributes:
        ref: as it was asked for.
        location: of the repository.
        manifest: without the parts that were dropped since.
        manifest_digest: of the bytes of its manifest.
        run_data: the run.
        claims: why it is kept.
        metrics: all that is known, the last value of each.
        measured: what was measured after it was saved.
        state: part to the class of what was given for it.
        lineage: what it continues, the nearest first, and whether that exists.
        validations: earliest first.
        signatures: beside its manifest, the newest first; nothing of them is verified.
        alias_periods: when aliases pointed at it, by alias.
        damage: what could not be read, a sentence each.
        description: what the user says.
    """

    ref: str
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
        """The last one that can be read."""
        return self.validations[-1] if self.validations else None

    @property
    def evaluated(self) -> Mapping[str, float]:
        """The metrics as the last validation has found them; nothing without one."""
        return {} if self.validation is None else self.validation.metrics
