"""What several test modules draw from: metrics, rules, trees of records, manifests, journal events."""

import math
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import strategies as st
from msgspec import UNSET

from peakpoint.format.manifest import FileRecord, Manifest, TensorRecord
from peakpoint.rules import Best, BestAtSparsity, Every, Last, Mode, Moment, Pareto, Rule, Thin, TopK

START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)

# Few values, so that ties are frequent, and all the values that are no numbers or nearly none.
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, 2.0, -1.0, 0.5, 5e-324, 1.7976931348623157e308]
values = st.sampled_from(SPECIAL) | st.floats()
metric_names = st.sampled_from(["m", "val/loss"])
metrics = st.dictionaries(metric_names, values, max_size=2)
modes: st.SearchStrategy[Mode] = st.sampled_from(["max", "min"])
# What cannot be encoded as UTF-8 cannot be in a file of ours.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,20}", fullmatch=True)
counts = st.integers(1, 4)
keeps = st.none() | st.integers(1, 3)
# Fractions of a minute that binary numbers hold exactly, so that an oracle in whole seconds agrees at the boundaries.
minutes = st.sampled_from([0.5, 1, 1.5, 10, 60, 60.0, 1440])

bests = st.builds(Best, metric_names, modes)
topks = st.builds(TopK, metric_names, modes, counts)
everies = (
    st.builds(Every, epochs=counts, keep=keeps)
    | st.builds(Every, steps=st.integers(1, 30), keep=keeps)
    | st.builds(Every, minutes=minutes, keep=keeps)
)
lasts = st.builds(Last, counts)
options = {"min_epoch": st.none() | st.integers(0, 4), "warmup": st.integers(0, 40), "pending": st.integers(0, 2)}
targets = st.lists(st.sampled_from([0, 0.25, 0.5, 1]), min_size=1, max_size=3)
at_sparsity = st.builds(
    BestAtSparsity, st.just("m"), modes, targets, st.sampled_from([0, 0.1, 0.25, 1]), st.just("val/loss"), **options
)
paretos = st.builds(Pareto, st.fixed_dictionaries({"m": modes, "val/loss": modes}), **options)
choosy = st.builds(Best, metric_names, modes, **options) | st.builds(TopK, metric_names, modes, counts, **options)
thins = st.builds(Thin, st.integers(2, 4))
one_rule: st.SearchStrategy[Rule] = bests | topks | everies | lasts | at_sparsity | paretos | choosy | thins
rule_lists = st.lists(one_rule, max_size=4)


def identity(number: int) -> str:
    """A different id for each number, in an order that has nothing to do with theirs."""
    return f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}"


@dataclass(frozen=True)
class Report:
    """What a training loop says at one moment."""

    metrics: dict[str, float]
    step: int
    epoch: int | None
    at: datetime


# Steps and clocks that repeat and run backwards, as after a resume or a correction of the clock.
reports = st.builds(
    Report,
    metrics,
    st.integers(0, 90),
    st.none() | st.integers(0, 9),
    st.integers(-7200, 7200).map(lambda seconds: START + timedelta(seconds=seconds)),
)


@dataclass
class Tree:
    """A run's records with the truth about their descent, which the records only encode as forks."""

    records: list[Moment] = field(default_factory=list)
    ancestors: dict[str, frozenset[str]] = field(default_factory=dict)  # with the record itself


@st.composite
def trees(draw: st.DrawFn, max_size: int = 10) -> Tree:
    """Records of a run that was resumed from here and there, each of them saved."""
    tree = Tree()
    forks: tuple[tuple[int, int], ...] = ()
    path: frozenset[str] = frozenset()
    sequence = 0
    for number, report in enumerate(draw(st.lists(reports, max_size=max_size)), 1):
        # mostly straight on; else from any record, or (-1) from nothing
        origin = draw(st.none() | st.none() | st.integers(-1, len(tree.records) - 1)) if tree.records else None
        if origin is not None and origin >= 0:
            parent = tree.records[origin]
            path = tree.ancestors[parent.id]
            forks = (*parent.forks, (parent.sequence, sequence + 1)) if sequence > parent.sequence else parent.forks
        elif origin is not None:
            path, forks = frozenset(), ((0, sequence + 1),)
        sequence += draw(st.integers(1, 2))  # numbers of checkpoints that exist no more are missing
        record = Moment(
            id=identity(number),
            sequence=sequence,
            step=report.step,
            epoch=report.epoch,
            metrics=report.metrics,
            created_at=report.at,
            forks=forks,
        )
        path = path | {record.id}
        tree.records.append(record)
        tree.ancestors[record.id] = path
    return tree


DIGEST = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"


def manifest(**changes: Any) -> Manifest:
    """A small manifest like a real one."""
    number = changes.get("sequence", 1)
    plain: dict[str, Any] = {
        "id": identity(number),
        "run": "r",
        "name": f"r_step{number}",
        "sequence": number,
        "report": number,
        "step": number,
        "epoch": None,
        "metrics": {"m": 0.5},
        "reasons": ("the newest",),
        "asked": None,
        "parts": {},
        "files": (),
        "parent": None,
        "forks": (),
        "created_at": START,
        "written_by": {"host": "h", "pid": "1"},
        "timing": {},
    }
    return Manifest(**{**plain, **changes})


def _names_of(files):
    return tuple(file.name for file in files)


_natural = st.integers(0, 2**63 - 1)
_digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
_tensors = st.builds(
    TensorRecord,
    texts,
    st.sampled_from(["F32", "BF16", "I64"]),
    st.lists(_natural, max_size=3).map(tuple),
    _natural,
    _natural,
    _digests,
)
_files = st.builds(
    FileRecord,
    name=names,
    size=_natural,
    digest=_digests,
    header=_natural,
    header_digest=_digests | st.just(""),
    tensors=st.lists(_tensors, max_size=2).map(tuple),
    offsets=st.booleans(),
).map(
    lambda file: replace(
        file, offsets=tuple(tensor.shape for tensor in file.tensors) if file.offsets and file.tensors else UNSET
    )
)
times = st.datetimes(datetime(1971, 1, 1), datetime(9000, 1, 1), timezones=st.just(UTC)).map(  # noqa: DTZ001 - naive bounds
    lambda time: time.replace(fold=0)
)
any_metrics = st.dictionaries(texts, values, max_size=4)
text_tuples = st.lists(texts, max_size=2).map(tuple)
manifests = st.builds(
    Manifest,
    id=_digests.map(lambda digest: digest[:16]),
    run=names,
    name=names,
    sequence=_natural,
    report=_natural,
    step=_natural,
    epoch=st.none() | _natural,
    metrics=any_metrics,
    reasons=text_tuples,
    asked=st.none() | texts,
    parts=st.dictionaries(texts, text_tuples, max_size=2),
    files=st.lists(_files, max_size=2, unique_by=lambda file: file.name).map(tuple),
    parent=st.none() | names,
    forks=st.lists(st.tuples(_natural, _natural), max_size=3).map(tuple),
    created_at=times,
    written_by=st.dictionaries(texts, texts, max_size=2),
    timing=st.dictionaries(texts, st.floats(allow_nan=False, allow_infinity=False), max_size=2),
).map(lambda manifest: replace(manifest, parts=dict.fromkeys(manifest.parts, _names_of(manifest.files))))
