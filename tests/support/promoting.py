"""Validations for tests of promotion, made without a model."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import peakpoint as pp
from peakpoint.repository import reader, validations
from peakpoint.repository.provenance import utc_now
from peakpoint.repository.validations import Finding, Predictions, Validation, ValidationSpec
from training import checkpointer

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)


def repository(root, accuracies=(0.7, 0.9, 0.8), run="r", **options):
    """A run with a checkpoint for each accuracy."""
    with checkpointer(root, run=run, state={"x": 1}, **options) as ckpt:
        for step, accuracy in enumerate(accuracies, 1):
            ckpt.report(step=step, accuracy=accuracy)
    return pp.open(root)


def validated(found, ref, *, failures=(), at=None, predicted=None, labels=None, **members):
    """Record a validation of a checkpoint."""
    run, manifest = found.locate(ref)
    store = found.store
    predictions = None
    if predicted is not None:
        predictions = validations.keep_predictions(store, run.name, manifest.id, Predictions(predicted, labels))
    findings = [Finding(check="integrity", outcome="passed", said="every byte is as it was")]
    findings += [Finding(check=check, outcome="failed", said=f"{check} is wrong") for check in failures]
    given = {"wanted": ValidationSpec(), **members}
    return validations.record(
        store,
        Validation(
            run=run.name,
            checkpoint=manifest.id,
            name=manifest.name,
            number=0,
            manifest=reader.manifest_digest(store, manifest),
            parts=tuple(manifest.parts),
            at=utc_now() if at is None else at,
            by="a test",
            findings=tuple(findings),
            predictions=predictions,
            **given,
        ),
    )


class Clock:
    """A clock that goes on by a second each time."""

    def __init__(self, start=NOON):
        self.now = start

    def __call__(self):
        self.now += timedelta(seconds=1)
        return self.now


__all__ = ["NOON", "Clock", "replace", "repository", "validated"]
