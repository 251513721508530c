"""Refs: every form, hostile text, branches, and messages that help."""

from dataclasses import dataclass

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import peakpoint as pp
from peakpoint.errors import ConfigError, NotFoundError
from peakpoint.format.names import did_you_mean
from peakpoint.repository.refs import AtEpoch, AtStep, BestOf, ByName, Latest, direction, parse, resolve
from peakpoint.rules import Best, Last, Moment, TopK
from strategies import START, Tree, identity, modes, rule_lists, trees
from training import checkpointer


@dataclass(frozen=True)
class Stored:
    """A record with a directory."""

    moment: Moment
    name: str

    def __getattr__(self, attribute):
        return getattr(self.moment, attribute)


def stored(sequence, step=0, epoch=None, name=None, forks=(), id=None, **metrics):  # noqa: A002 - as in refs
    moment = Moment(
        id=id or identity(sequence),
        sequence=sequence,
        step=step,
        epoch=epoch,
        metrics=metrics,
        created_at=START,
        forks=forks,
    )
    return Stored(moment, name or f"r_step{step}")


def shelved(tree: Tree):
    return [Stored(moment, f"c{number}") for number, moment in enumerate(tree.records)]


# --- parse --------------------------------------------------------------------------------------------------------

runs = st.from_regex(r"\A[A-Za-z0-9_][A-Za-z0-9._+-]{0,8}[A-Za-z0-9]\Z")
metric_texts = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Z"], exclude_characters=":"), min_size=1, max_size=9
)
refs = (
    st.builds(Latest, runs)
    | st.builds(BestOf, runs, metric_texts, st.none() | modes)
    | st.builds(AtEpoch, runs, st.integers(0, 10**18))
    | st.builds(AtStep, runs, st.integers(0, 10**18))
    | st.builds(ByName, runs, st.text(min_size=1, max_size=9))
)


def text_of(ref):
    match ref:
        case Latest(run):
            return f"{run}@latest"
        case BestOf(run, metric, None):
            return f"{run}@best:{metric}"
        case BestOf(run, metric, mode):
            return f"{run}@best:{metric}:{mode}"
        case AtEpoch(run, epoch):
            return f"{run}:epoch={epoch}"
        case AtStep(run, step):
            return f"{run}:{step}"
        case ByName(run, name):
            return f"{run}/{name}"


@settings(max_examples=200)
@given(refs)
def test_every_form_is_read(ref):
    assert parse(text_of(ref)) == ref


def test_examples():
    assert parse("resnet50@best:val/loss:min") == BestOf("resnet50", "val/loss", "min")
    assert parse("resnet50@best:val/loss") == BestOf("resnet50", "val/loss", None)
    assert parse("r@best") == BestOf("r")
    assert parse("r@last") == parse("r@latest") == Latest("r")
    assert parse("r/a:b@c/d") == ByName("r", "a:b@c/d")
    assert parse("r:0") == AtStep("r", 0)
    assert parse("r:epoch=007") == AtEpoch("r", 7)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "r",
        "@latest",
        ":3",
        "/name",
        "r@",
        "r:",
        "r/",
        "r@Latest",
        "r@latest ",
        "r@best ",
        "r@best:",
        "r@best:m:",
        "r@best:m:up",
        "r@best:m:max:x",
        "r@best:a b",
        "r:-1",
        "r:+1",
        "r:1.5",
        "r:1_0",
        "r:epoch=",
        "r:epoch=-1",
        "r:epoch=x",
        "r:step=3",
        "r:٣",
        "r:epoch=٣",
        "r:²",
        "../x/name",
        "a b@latest",
        "r\n@latest",
        "-r@latest",
        "é:3",
        "a" * 101 + ":3",
        "r:\x00",
        "r@�",
    ],
)
def test_texts_that_are_no_refs(text):
    with pytest.raises(ConfigError):
        parse(text)


@pytest.mark.parametrize("text", ["r", "r@wrong", "r:x"])
def test_the_message_lists_the_forms(text):
    with pytest.raises(ConfigError, match=r"forms: RUN@latest, RUN@best, RUN@best:METRIC\[:max\|:min\], RUN:epoch=N"):
        parse(text)


hostile = st.text(max_size=12) | st.lists(
    st.sampled_from(
        ["r", "@", ":", "/", "best", "latest", "epoch=", "m", "max", "min", "3", "0", "-", ".", "..", "\x00"]
    )
    | st.sampled_from(["\n", " ", "٣", "é", "\ud800", "c0", "9e37", "9" * 4301, "c1", "x" * 300]),
    max_size=9,
).map("".join)


@settings(max_examples=400)
@given(hostile, trees(max_size=4), rule_lists)
@example("r:" + "1" * 4301, Tree(), [])
@example("r:epoch=" + "1" * 4301, Tree(), [])
@example("r/" + "\x00", Tree(), [])
def test_hostile_text_meets_errors_of_ours_only(text, tree, rules):
    records = shelved(tree)
    try:
        found = resolve(parse(text), records, rules)
    except (ConfigError, NotFoundError) as error:
        assert str(error)  # noqa: PT017 - either outcome is right
    else:
        assert found in records


# --- resolve ------------------------------------------------------------------------------------------------------


@given(trees())
def test_latest_is_the_highest_sequence(tree):
    records = shelved(tree)
    assume(records)
    assert resolve(Latest("r"), records[::-1], []) == records[-1]


@given(trees(), st.sampled_from(["m", "val/loss"]), modes, rule_lists)
def test_best_is_what_the_rule_claims(tree, metric, mode, rules):
    records = shelved(tree)
    assume(records)
    claimed = Best(metric, mode).claims(tree.records)
    if claimed:
        assert resolve(BestOf("r", metric, mode), records, rules).id in claimed
        assert resolve(BestOf("r", metric), records, [Best(metric, mode)]).id in claimed
    else:
        with pytest.raises(NotFoundError, match="finite value"):
            resolve(BestOf("r", metric, mode), records, rules)


@settings(max_examples=200)
@given(trees(), st.data())
def test_steps_and_epochs_give_the_newest_of_the_newest_branch_then_of_others(tree, data):
    records = shelved(tree)
    assume(records)
    wanted = data.draw(st.sampled_from(records))
    by_epoch = wanted.epoch is not None and data.draw(st.booleans())
    ref = AtEpoch("r", wanted.epoch) if by_epoch else AtStep("r", wanted.step)
    same = [record for record in records if (record.epoch == ref.epoch if by_epoch else record.step == ref.step)]
    branch = tree.ancestors[records[-1].id]
    on_branch = [record for record in same if record.id in branch]
    expected = max(on_branch or same, key=lambda record: record.sequence)
    assert resolve(ref, data.draw(st.permutations(records)), []) == expected


def test_the_newest_branch_goes_before_an_abandoned_one_with_a_higher_sequence():
    records = [
        stored(1, step=10),
        stored(2, step=20, name="kept"),
        stored(3, step=20, name="abandoned", forks=((1, 3),)),
        stored(4, step=30, forks=((2, 4),)),
    ]
    assert resolve(AtStep("r", 20), records, []).name == "kept"
    assert resolve(AtStep("r", 20), records[:3], []).name == "abandoned"
    assert resolve(AtStep("r", 20), [records[0], *records[2:]], []).name == "abandoned"


@given(trees(), st.data())
def test_names_ids_and_beginnings_of_ids_find_their_record(tree, data):
    records = shelved(tree)
    assume(records)
    wanted = data.draw(st.sampled_from(records))
    length = data.draw(st.integers(4, 16))
    assert resolve(ByName("r", wanted.name), records, []) == wanted
    assert resolve(ByName("r", wanted.id), records, []) == wanted
    beginning = wanted.id[:length]
    if sum(record.id.startswith(beginning) for record in records) == 1:
        assert resolve(ByName("r", beginning), records, []) == wanted


def test_beginnings_of_ids_must_be_long_enough_and_unambiguous():
    records = [
        stored(1, id="abcdef0000000001"),
        stored(2, id="abcdef0000000002", step=1),
        stored(3, id="0123456789abcdef"),
    ]
    assert resolve(ByName("r", "0123"), records, []).sequence == 3
    with pytest.raises(NotFoundError, match="no checkpoint named '012'"):
        resolve(ByName("r", "012"), records, [])
    with pytest.raises(NotFoundError, match=r"several ids: abcdef0000000001, abcdef0000000002"):
        resolve(ByName("r", "abcdef"), records, [])
    assert resolve(ByName("r", "abcdef0000000002"), records, []).sequence == 2


def test_a_whole_name_goes_before_the_beginning_of_an_id():
    records = [stored(1, id="cafe000000000000", name="x"), stored(2, id="0000000000000000", name="cafe")]
    assert resolve(ByName("r", "cafe"), records, []).sequence == 2


@pytest.mark.parametrize(
    "ref", [Latest("r"), BestOf("r", "m", "max"), AtEpoch("r", 1), AtStep("r", 1), ByName("r", "x")]
)
def test_an_empty_run_has_no_checkpoints(ref):
    with pytest.raises(NotFoundError, match="run 'r' has no checkpoints yet"):
        resolve(ref, [], [])


def test_misses_name_what_there_is():
    records = [stored(n, step=100 * n, epoch=n, name=f"r_epoch{n}", **{"val/loss": 1.0}) for n in (1, 2, 3)]
    with pytest.raises(NotFoundError, match=r"no checkpoint at step 7; it has steps 100, 200, 300$"):
        resolve(AtStep("r", 7), records, [])
    with pytest.raises(NotFoundError, match=r"no checkpoint of epoch 7; it has epochs 1, 2, 3$"):
        resolve(AtEpoch("r", 7), records, [])
    with pytest.raises(NotFoundError, match=r"it has epochs none$"):
        resolve(AtEpoch("r", 7), [stored(1)], [])
    with pytest.raises(NotFoundError, match=r"no checkpoint named 'r_epoch22'; did you mean 'r_epoch2'"):
        resolve(ByName("r", "r_epoch22"), records, [])
    with pytest.raises(NotFoundError, match=r"'val_loss'; did you mean 'val/loss'\?; metrics: val/loss$"):
        resolve(BestOf("r", "val_loss", "min"), records, [])
    with pytest.raises(NotFoundError, match=r"'m'; metrics: none$"):
        resolve(BestOf("r", "m", "min"), [stored(1)], [])


def test_long_lists_are_shortened_to_their_end():
    records = [stored(n, step=n) for n in range(1, 31)]
    with pytest.raises(NotFoundError, match=r"it has steps \.\.\., 11, 12, .*, 30$"):
        resolve(AtStep("r", 99), records, [])


def test_near_names_near_names_only():
    assert did_you_mean("val_los", ["val_loss", "acc"]) == "; did you mean 'val_loss'?"
    assert did_you_mean("zzz", ["val_loss", "acc"]) == ""
    assert did_you_mean("a", []) == ""


def test_the_direction_comes_from_the_rules_or_must_be_said():
    assert direction("r", "m", [Last(1), TopK("m", "min", 3), Best("m", "min")]) == "min"
    with pytest.raises(ConfigError, match=r"no rule of this run ranks by it; give r@best:m:max or :min"):
        direction("r", "m", [Best("other", "max"), Last(1)])
    with pytest.raises(ConfigError, match="both ways"):
        direction("r", "m", [Best("m", "max"), Best("m", "min")])
    records = [stored(1, m=1.0), stored(2, m=2.0)]
    with pytest.raises(ConfigError, match="is larger better"):
        resolve(BestOf("r", "m"), records, [])
    assert resolve(BestOf("r", "m"), records, [Best("m", "min")]).sequence == 1
    assert resolve(BestOf("r", "m", "max"), records, [Best("m", "min")]).sequence == 2  # what is said goes before


def test_a_ref_of_another_run_is_refused_by_a_run(tmp_path):
    for name in ("one", "two"):
        with checkpointer(tmp_path, run=name) as ckpt:
            ckpt.report(step=1, acc=0.5)
    run = pp.open(tmp_path).run("one")
    for ref in ("two@latest", "two:1", f"two/{pp.open(tmp_path).run('two').latest().name}"):
        for act in (run.find, lambda ref: run.record(ref, {"z": 1.0}), lambda ref: run.pin(ref, "why")):
            with pytest.raises(pp.errors.ConfigError, match="names run 'two', and this is run 'one'"):
                act(ref)
    assert "z" not in run.latest().metrics
