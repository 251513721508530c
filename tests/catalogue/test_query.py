"""The language of selection: what it means, beside brute force on two databases; and what it says of slips."""

import contextlib
import fnmatch
import math
import re
import sqlite3
from datetime import timedelta

import pytest
import sqlalchemy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import peakpoint as pp
from peakpoint.catalogue import Catalogue, SelectionQuery
from peakpoint.catalogue.query import FIELDS, parse
from peakpoint.catalogue.ranking import WithinSE, ranking_keys
from peakpoint.errors import ConfigError, Error, NotFoundError, printable
from peakpoint.format.events import Closed, Opened
from peakpoint.format.manifest import FileRecord
from peakpoint.format.settings import Settings
from peakpoint.repository.journal import Journal
from peakpoint.repository.root import ensure_repository, ensure_run
from peakpoint.store import LocalStore
from rows import point, write
from strategies import DIGEST, START, identity, manifest

NAMES = ["acc", "val/loss", "x.y", "Spärlich", "select", "epoch"]  # the last is a field, too
VALUES = [None, math.nan, math.inf, -math.inf, 0.0, -1.0, 0.5, 0.7, 1.0, 3.0]


def build(root):
    """A repository of 60 checkpoints with all sorts of metrics; manifests only, nothing here opens a weight file."""
    store = LocalStore(root)
    ensure_repository(store, START)
    made = []
    for number in range(60):
        run = ("resnet50-a", "resnet18_b", "Resnet50[c]")[number % 3].replace("[c]", "c")
        if number < 3:
            ensure_run(store, run, START, {}, ())
            open_with(store, run, SETTINGS[run])
        values = {name: VALUES[(number * (place + 3) + number // 7) % len(VALUES)] for place, name in enumerate(NAMES)}
        one = manifest(
            run=run,
            id=identity(number),
            name=f"n{number}%_x",
            sequence=number + 1,
            step=number * 7 % 50,
            epoch=None if number % 5 == 0 else number % 11,
            metrics={name: value for name, value in values.items() if value is not None},
            reasons=("the newest",) if number % 2 else (f"best 100% {number}", "every_10"),
            files=(FileRecord(name="model.safetensors", size=number % 4 * 1000 + 1, digest=DIGEST),),
            created_at=START + timedelta(hours=number % 17),
        )
        write(store, one)
        made.append(one)
    for alias, places in POINTED.items():
        for place in places:
            point(store, alias, None if place is None else made[place])
    return made


def open_with(store, run, given):
    """Let the journal say that a training with these settings has opened the run, and ended."""
    journal = Journal(store, run, lambda: START)
    journal.append(Opened(at=START, by={}, rules=(), config=given.config, tags=given.tags))
    journal.append(Closed(at=START, why="closed"))
    journal.close()


SETTINGS = {
    "resnet50-a": Settings({"lr": 0.5, "opt": {"name": "adamw", "betas": [0.9]}, "amp": True, "n": None}, ("try_2",)),
    "resnet18_b": Settings({"lr": 3, "opt": {"name": "sgd 100%"}, "weight-decay": 0.5, "amp": False}, ("old", "try 3")),
    "Resnet50c": Settings(),
}


def setting(one, name):
    return SETTINGS[one.run].flat().get(name)


# each alias, with where it pointed: the last counts
POINTED = {"champion": [7, 3], "resnet50/champion": [3], "challenger_1": [10, 11, 10], "old_1": [5, None]}
HELD = {"champion": 3, "resnet50/champion": 3, "challenger_1": 10}


class Made(list):
    """The checkpoints of the repository; prints itself in short, as examples of Hypothesis show it."""

    def __repr__(self):
        return "made"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("query")
    found = Made(build(root))
    found.root = root
    return found


@pytest.fixture(scope="module")
def catalogues(made, postgres_server):
    """The same repository in both databases."""
    import psycopg

    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute("DROP SCHEMA IF EXISTS query CASCADE")
        connection.execute("CREATE SCHEMA query")
    store = LocalStore(made.root)
    found = [Catalogue(store), Catalogue(store, f"{postgres_server}?options=-csearch_path%3Dquery")]
    for catalogue in found:
        catalogue.refresh()
        catalogue.candidate_limit = 40  # so that 60 checkpoints are many
    yield found
    for catalogue in found:
        catalogue.close()


def select(catalogue, text, by=None, top=None, within=None):
    return catalogue.select(SelectionQuery(query=parse(text), keys=ranking_keys(by or {}), top=top, within=within))


# --- the oracle: Kleene's three values, None is unknown -----------------------------------------------------------


def known(value):
    return None if value is None or (isinstance(value, float) and math.isnan(value)) else value


def both(function):
    return lambda a, b: None if a is None or b is None else known(function(a, b))


def negation(condition):
    return None if condition is None else not condition


def conjunction(conditions):
    return False if False in conditions else None if None in conditions else True


def disjunction(conditions):
    return True if True in conditions else None if None in conditions else False


NUMBERS = {
    "epoch": lambda one: known(one.epoch),
    "step": lambda one: one.step,
    "sequence": lambda one: one.sequence,
    "size": lambda one: one.size_bytes,
    "acc": lambda one: known(one.metrics.get("acc")),
    "x.y": lambda one: known(one.metrics.get("x.y")),
    "Spärlich": lambda one: known(one.metrics.get("Spärlich")),
    "metric('val/loss')": lambda one: known(one.metrics.get("val/loss")),
    "config.lr": lambda one: setting(one, "lr"),
    "config('weight-decay')": lambda one: setting(one, "weight-decay"),
    "`select`": lambda one: known(one.metrics.get("select")),
    'metric("epoch")': lambda one: known(one.metrics.get("epoch")),
}
ARITHMETIC = {
    "+": both(lambda a, b: a + b),
    "-": both(lambda a, b: a - b),
    "*": both(lambda a, b: a * b),
    "/": both(lambda a, b: None if b == 0 else a / b),
}
COMPARED = {
    "<": both(lambda a, b: a < b),
    "<=": both(lambda a, b: a <= b),
    ">": both(lambda a, b: a > b),
    ">=": both(lambda a, b: a >= b),
    "==": both(lambda a, b: a == b),
    "=": both(lambda a, b: a == b),
    "!=": both(lambda a, b: a != b),
    "<>": both(lambda a, b: a != b),
}
constants = st.sampled_from([0, 1, 3, 10, 0.5, 0.7, 1.5, 1001]).map(lambda n: (repr(n), lambda _one, n=n: n))
plain = constants | st.sampled_from(sorted(NUMBERS.items()))


def arithmetic(inner):
    binary = st.tuples(inner, st.sampled_from(sorted(ARITHMETIC)), inner).map(
        lambda t: (f"({t[0][0]} {t[1]} {t[2][0]})", lambda one: ARITHMETIC[t[1]](t[0][1](one), t[2][1](one)))
    )
    negative = inner.map(lambda v: (f"(-{v[0]})", lambda one: None if v[1](one) is None else -v[1](one)))
    absolute = inner.map(lambda v: (f"ABS({v[0]})", lambda one: None if v[1](one) is None else abs(v[1](one))))
    return binary | negative | absolute


def held(one):
    return {alias for alias, place in HELD.items() if one.id == identity(place)}


def both_texts(name, test):
    """A test of a setting; unknown where there is none."""
    return lambda one: None if setting(one, name) is None else test(setting(one, name))


numbers = st.recursive(plain, arithmetic, max_leaves=3)
TEXTS = {
    'run ~ "resnet50*"': lambda one: fnmatch.fnmatchcase(one.run, "resnet50*"),
    "name ~ 'n?%_x'": lambda one: re.fullmatch(r"n.%_x", one.name) is not None,
    "run == 'resnet18_b'": lambda one: one.run == "resnet18_b",
    "run in ('resnet18_b', 'none')": lambda one: one.run == "resnet18_b",
    "run not in ['resnet18_b']": lambda one: one.run != "resnet18_b",
    "name != 'n7%_x'": lambda one: one.name != "n7%_x",
    'reason ~ "best 100%*"': lambda one: one.reasons[0].startswith("best 100%"),
    "reason ~ 'every?10'": lambda one: "every_10" in one.reasons,
    "alias == 'champion'": lambda one: "champion" in held(one),
    "alias != 'champion'": lambda one: "champion" not in held(one),
    "alias ~ '*champion'": lambda one: any(alias.endswith("champion") for alias in held(one)),
    "alias in ('challenger_1', 'old_1')": lambda one: "challenger_1" in held(one),
    "alias not in ['champion']": lambda one: "champion" not in held(one),
    "has(alias)": lambda one: bool(held(one)),
    "tag == 'old'": lambda one: "old" in SETTINGS[one.run].tags,
    "tag != 'old'": lambda one: "old" not in SETTINGS[one.run].tags,
    "tag ~ 'try?3'": lambda one: one.run == "resnet18_b",
    "tag in ('old', 'try_2')": lambda one: bool(SETTINGS[one.run].tags),
    "has(tag)": lambda one: bool(SETTINGS[one.run].tags),
    "config.opt.name == 'adamw'": both_texts("opt.name", lambda text: text == "adamw"),
    "'adamw' != config.opt.name": both_texts("opt.name", lambda text: text != "adamw"),
    "config.opt.name ~ '*100%'": both_texts("opt.name", lambda text: text.endswith("100%")),
    "config.opt.name in ('sgd', 'adamw')": both_texts("opt.name", lambda text: text == "adamw"),
    "config.opt.name not in ['adamw']": both_texts("opt.name", lambda text: text != "adamw"),
    "config.opt.name > 0": lambda _: None,
    "config.opt.betas == '[0.9]'": lambda one: None if one.run != "resnet50-a" else True,
    "config.lr == '0.5'": lambda one: None if setting(one, "lr") is None else setting(one, "lr") == 0.5,
    "config.lr < config.lr + 1": lambda one: None if setting(one, "lr") is None else True,
    "config.lr == config.amp": lambda one: None if setting(one, "lr") is None else False,
    "config.amp": lambda one: setting(one, "amp"),
    "config.amp == 'true'": lambda one: setting(one, "amp"),
    "has(config.amp)": lambda one: setting(one, "amp") is not None,
    "has(config('weight-decay'))": lambda one: one.run == "resnet18_b",
    "has(epoch)": lambda one: one.epoch is not None,
    "has(acc)": lambda one: known(one.metrics.get("acc")) is not None,
    "has('val/loss')": lambda one: known(one.metrics.get("val/loss")) is not None,
    "HAS(run)": lambda _: True,
    "pinned": lambda _: False,
    "whole": lambda _: True,
    "archived": lambda _: False,
    "size < '1.5 kB'": lambda one: one.size_bytes < 1500,
    "created >= '2026-03-01T20:00'": lambda one: one.created_at >= START + timedelta(hours=8),
    "created < '2026-03-02'": lambda one: one.created_at < START + timedelta(hours=12),
    "step % 10 == 7": lambda one: one.step % 10 == 7,
}
comparisons = st.tuples(numbers, st.sampled_from(sorted(COMPARED)), numbers).map(
    lambda t: (f"{t[0][0]} {t[1]} {t[2][0]}", lambda one: COMPARED[t[1]](t[0][1](one), t[2][1](one)))
)
betweens = st.tuples(numbers, st.booleans(), numbers, numbers).map(
    lambda t: (
        f"{t[0][0]} {'not ' if t[1] else ''}between {t[2][0]} AND {t[3][0]}",
        lambda one: (negation if t[1] else lambda c: c)(
            conjunction([COMPARED[">="](t[0][1](one), t[2][1](one)), COMPARED["<="](t[0][1](one), t[3][1](one))])
        ),
    )
)


def readable(condition):
    """Constants in the wrong order are refused."""
    try:
        parse(condition[0])
    except ConfigError as error:
        assert "smaller value first" in str(error)  # noqa: PT017 - a filter, not a test
        return False
    return True


betweens = betweens.filter(readable)
chains = st.tuples(numbers, numbers, numbers).map(
    lambda t: (
        f"{t[0][0]} <= {t[1][0]} < {t[2][0]}",
        lambda one: conjunction(
            [COMPARED["<="](t[0][1](one), t[1][1](one)), COMPARED["<"](t[1][1](one), t[2][1](one))]
        ),
    )
)
amongs = st.tuples(numbers, st.lists(constants, min_size=1, max_size=3)).map(
    lambda t: (
        f"{t[0][0]} in ({', '.join(c[0] for c in t[1])})",
        lambda one: disjunction([COMPARED["=="](t[0][1](one), c[1](one)) for c in t[1]]),
    )
)
simple = comparisons | betweens | chains | amongs | st.sampled_from(sorted(TEXTS.items()))


def joined(inner):
    many = st.tuples(st.sampled_from(["and", "or", "AND", "Or"]), st.lists(inner, min_size=2, max_size=3))
    return many.map(
        lambda t: (
            "(" + f" {t[0]} ".join(c[0] for c in t[1]) + ")",
            lambda one: (conjunction if t[0].lower() == "and" else disjunction)([c[1](one) for c in t[1]]),
        )
    ) | inner.map(lambda c: (f"not ({c[0]})", lambda one: negation(c[1](one))))


conditions = st.recursive(simple, joined, max_leaves=4)


@settings(max_examples=250, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(conditions)
def test_a_condition_selects_what_it_says_on_both_databases(made, catalogues, condition):
    text, holds = condition
    expected = {one.id for one in made if holds(one) is True}
    for catalogue in catalogues:
        selection = select(catalogue, text)
        assert {found.id for found in selection} == expected, text
        assert selection.count() == len(expected)


RANKED = ["acc", "val/loss", "size", "epoch", "step", "created"]


@settings(max_examples=80, deadline=None)
@given(
    st.dictionaries(st.sampled_from(RANKED), st.sampled_from(["max", "min"]), max_size=3),
    st.none() | st.integers(1, 70),
    simple,
)
def test_the_order_is_that_of_the_keys_and_what_has_no_finite_value_is_left_out(made, catalogues, by, top, condition):
    def value(one, name):
        if name == "created":
            return one.created_at.timestamp()
        fixed = {"size": one.size_bytes, "epoch": one.epoch, "step": one.step}
        return fixed[name] if name in fixed else one.metrics.get(name)

    text, holds = condition
    left = [
        one
        for one in made
        if holds(one) is True and all(value(one, n) is not None and math.isfinite(value(one, n)) for n in by)
    ]
    for catalogue in catalogues:
        found = [next(one for one in made if one.id == chosen.id) for chosen in select(catalogue, text, by, top)]
        places = [tuple(value(one, n) * (-1 if mode == "max" else 1) for n, mode in by.items()) for one in found]
        assert places == sorted(places)
        assert len(found) == min(len(left), top or len(left))
        if by and found:
            best = min(tuple(value(one, n) * (-1 if mode == "max" else 1) for n, mode in by.items()) for one in left)
            assert places[0] == best


def test_what_is_selected_is_what_the_files_say(made, catalogues):
    for catalogue in catalogues:
        for found in select(catalogue, "id == '" + made[3].id + "'"):
            one = made[3]
            assert (found.run, found.name, found.sequence, found.step) == (one.run, one.name, one.sequence, one.step)
            assert repr(dict(found.metrics)) == repr(dict(one.metrics)), "NaN and infinities as well"
            assert (found.reasons, found.parts, found.forks) == (one.reasons, one.parts, one.forks)
            assert found.created_at == one.created_at
            assert found.path == made.root / "runs" / one.run / "checkpoints" / one.name


def test_first_and_nothing(catalogues):
    for catalogue in catalogues:
        assert select(catalogue, "", {"step": "max"}).first().step == 49
        with pytest.raises(NotFoundError, match="no checkpoint matches step > 1000"):
            select(catalogue, "step > 1000").first()


# --- why ----------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(simple, min_size=1, max_size=3))
def test_why_counts_what_each_clause_removes(made, catalogues, clauses):
    text = " and ".join(f"({clause})" for clause, _ in clauses)
    for catalogue in catalogues:
        why = select(catalogue, text, top=2).why()
        left = list(made)
        assert why.candidates == 60
        told = list(why.clauses)
        for _, holds in clauses:
            after = [one for one in left if holds(one) is True]
            # between and chains are several clauses when they stand alone
            while told[0].left != len(after):
                told.pop(0)
            left = after
        assert why.clauses[-1].left == len(left)
        assert sum(clause.removed for clause in why.clauses) == 60 - len(left)
        assert why.chosen == min(2, len(left))
        assert len(why.runners_up) == min(3, max(0, len(left) - 2))
        assert [one.id for one in select(catalogue, text, top=5)][2:] == [one.id for one in why.runners_up]


def test_why_tells_what_had_no_value(made, catalogues):
    for catalogue in catalogues:
        [first, second] = select(catalogue, "acc > 0.6 and epoch >= 0").why().clauses
        unknown = sum(1 for one in made if known(one.metrics.get("acc")) is None)
        assert (first.text, first.missing) == ("acc > 0.6", unknown)
        assert second.missing == sum(1 for one in made if one.epoch is None and one.metrics.get("acc", 0) > 0.6)


# --- within one standard error ------------------------------------------------------------------------------------


def test_within_one_standard_error_the_smallest_is_chosen(tmp_path):
    store = LocalStore(tmp_path)
    ensure_repository(store, START)
    ensure_run(store, "r", START, {}, ())
    for number, (accuracy, sparsity, error) in enumerate(
        [(0.90, 0.1, 0.001), (0.899, 0.5, 0.5), (0.898, 0.7, 0.1), (0.80, 0.9, 0.1)], 1
    ):
        values = {"acc": accuracy, "pct": 100 * accuracy, "sparsity": sparsity, "acc_se": error, "n": 10_000}
        write(store, manifest(sequence=number, metrics=values))
    repository = pp.open(tmp_path)
    rule = WithinSE(n_eval=10_000)  # 0.003
    chosen = pp.select(repository, by={"acc": "max", "sparsity": "max"}, within=rule)
    assert [one.metrics["sparsity"] for one in chosen] == [0.7, 0.5, 0.1]
    by_metric = pp.select(repository, by={"acc": "max", "sparsity": "max"}, within=WithinSE(n_eval="n"))
    assert [one.sequence for one in by_metric] == [one.sequence for one in chosen]
    percent = pp.select(repository, by={"pct": "max"}, within=WithinSE(n_eval=10_000, percent=True))
    assert [one.sequence for one in percent] == [1, 2, 3], "without a further key the earliest is first"
    own = pp.select(repository, by={"acc": "max", "sparsity": "max"}, within=WithinSE(se="acc_se"))
    assert [one.sequence for one in own] == [2, 1], "the standard error of the best counts"
    low = pp.select(repository, "acc < 0.9", by={"acc": "min", "sparsity": "min"}, within=WithinSE(se="acc_se"))
    assert [one.sequence for one in low] == [2, 3, 4]
    assert "one standard error (0.003) of the best (0.9)" in chosen.why().clauses[-1].text
    for wrong, by, words in [
        (WithinSE(n_eval=10), {"pct": "max"}, "for an accuracy in percent, add --percent"),
        (WithinSE(n_eval=10), {}, "rank by a metric first"),
        (WithinSE(n_eval=10), {"size": "min"}, "rank by a metric first"),
        (WithinSE(n_eval="sparsity"), {"acc": "max"}, "no usable number of examples in 'sparsity': 0.1"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(words)):
            list(pp.select(repository, by=by, within=wrong))
    with pytest.raises(NotFoundError, match="did you mean 'acc_se'"):
        pp.select(repository, by={"acc": "max"}, within=WithinSE(se="acc_sd"))
    for options in ({}, {"n_eval": 5, "se": "x"}, {"n_eval": 0}, {"n_eval": True}, {"se": "a b"}):
        with pytest.raises(ConfigError):
            WithinSE(**options)
    assert list(pp.select(repository, "acc > 5", by={"acc": "max"}, within=rule)) == []


# --- slips --------------------------------------------------------------------------------------------------------

SLIPS = [
    ("acc >", 5, "not understood"),
    ("acc > 1 and", 11, "not understood"),
    ("(acc > 1", 0, "parentheses do not match"),
    ("acc > 1)", 7, "parentheses do not match"),
    ("acc > 1 step < 2", 8, "not understood"),
    ("acc", 0, "a value and not a condition; compare it, as in acc > 0"),
    ("alias", 0, "a value and not a condition; compare it, as in alias ~ 'x*' or has(alias)"),
    ("'alias'", 0, "a value and not a condition"),
    ("alias > 3", 8, "a text is compared with a text in quotes"),
    ("alias == champion", 9, "text in quotes"),
    ("1", 0, "a value and not a condition"),
    ("acc is null", 4, "has(x)"),
    ("acc == None", 7, "has(x)"),
    ("pinned == true", 10, "write pinned or not pinned"),
    ("pinned > 3", 0, "true or false by itself"),
    ("run like 'x'", 4, "pattern"),
    ("run > 'a'", 0, "texts are compared with"),
    ("run == 5", 7, "text in quotes"),
    ("run = sgd-s0", 6, "text in quotes"),
    ("run ~ sgd*", 10, "a pattern stands in quotes"),
    ("size > 40 kB", 10, "sizes and dates stand in quotes"),
    ("size > 40kB", 7, "sizes and dates stand in quotes"),
    ("epoch between 20 and 10", 14, "the smaller value first"),
    ("run == name", 0, "text in quotes"),
    ("tags == 'x'", 0, "a number with a number: 'tags' is taken for a metric; did you mean 'tag'?"),
    ("acc > 1 && step > 2", 8, "'&' has no meaning in a selection; write and"),
    ("acc > 1 || step > 2", 8, "write or"),
    ("!pinned", 0, "write not"),
    ("'a' == 'a'", 0, "text in quotes"),
    ("epoch > 'x'", 0, "text in quotes"),
    ("created > 5", 0, "a date in quotes"),
    ("created > 'yesterday'", 10, "2026-03-01"),
    ("size < '5 parsecs'", 7, "100 MB"),
    ("acc ~ 'x'", 0, "texts are run, name, id, reason"),
    ("run ~ 5", 6, "pattern in quotes"),
    ("acc in (1, step)", 11, "in takes numbers or texts"),
    ("run in (1, 2)", 8, "text in quotes"),
    ("acc % 2 == 0", 0, "% takes whole numbers"),
    ("step % 2.5 == 0", 0, "% takes whole numbers"),
    ("run + 1 > 2", 0, "not a number"),
    ("has(1)", 4, "name of a metric"),
    ("metric(1) > 2", 7, "a name in quotes"),
    ("sqrt(acc) > 1", 0, "functions are has(x)"),
    ("__import__('os').system('x') > 1", 16, "no meaning"),
    ("acc > 1; drop table runs", 7, "';' has no meaning"),
    ("lambda: 1", 6, "no meaning"),
    ("acc if acc else 1", 4, "not understood"),
    ("[acc] > 1", 0, "no meaning in a selection"),
    ("f'x' == run", 1, "not understood"),
    ("acc := 5", 4, "no meaning"),
    ("acc > 1 < pinned", 6, "true or false by itself"),
    ("(acc > 1) > 2", 1, "a condition stands where a value should"),
    ("acc > (not pinned)", 7, "a condition stands where a value should"),
    ("acc > (not step)", 11, "a value and not a condition"),
    ("acc > 1.2.3", 6, "no meaning"),
    ("acc > 0x10", 6, "no meaning"),
    ("acc ** 2 > 1", 5, "not understood"),
    ("acc\u00a0> \u2265 1", 6, "no meaning"),
    ("run == 'a\\d'", 7, "stands only before a quote"),
    ("run == 'abc", 7, "is missing"),
    ("run == '\ud800'", 7, "broken bytes"),
    ("acc in ()", 0, "at least one"),
    ("acc not in []", 0, "at least one"),
    ("epoch between 1", 0, "between takes two values"),
    ("epoch between 1 or 2", 0, "between takes two values"),
    ("acc > *", 6, "not understood"),
    ("config.lr > '0.1'", 0, "texts are compared with"),
    ("config.opt == run", 0, "text in quotes"),
    ("config.lr > created", 0, "a date in quotes"),
    ("config.lr == pinned", 0, "true or false by itself"),
    ("config.lr in (0.1, 'x')", 0, "numbers or texts, and not both"),
    ("config.lr ~ 3", 12, "pattern in quotes"),
    ("config(lr) > 1", 7, "config('weight-decay')"),
    ("config.step % 2 == 0", 0, "% takes whole numbers"),
    ("tag", 0, "compare it, as in tag ~ 'x*'"),
]


@pytest.mark.parametrize(("text", "place", "words"), SLIPS)
def test_a_slip_is_pointed_at(text, place, words):
    with pytest.raises(ConfigError) as caught:
        parse(text)
    message, shown, marks = str(caught.value).split("\n")
    assert words in message
    assert shown.strip() == printable(re.sub(r"\s", " ", text).strip())
    assert marks.index("^") - 2 == place, str(caught.value)


@pytest.mark.parametrize("text", ["(" * 300 + "acc > 1" + ")" * 300, "not " * 500 + "pinned", "-" * 400 + "acc > 1"])
def test_what_is_nested_too_deeply_is_refused(text):
    with pytest.raises(ConfigError, match=r"nested too deeply|not understood"):
        parse(text)


def test_what_is_long_is_refused_and_what_is_wide_is_not(catalogues):
    with pytest.raises(ConfigError, match="too long"):
        parse(" or ".join(["step == 1"] * 600))
    with pytest.raises(ConfigError, match="too long"):
        parse("1" * 60_000 + "x")
    wide = " or ".join(f"step == {number}" for number in range(450))
    for catalogue in catalogues:
        assert len(list(select(catalogue, wide))) == 60


@settings(max_examples=300)
@given(st.text(max_size=40) | st.text("acrun~()<>=!'\"`.0123456789 +-*/%,[]nothsidbewk", max_size=40))
def test_any_text_is_read_or_refused_by_us(text):
    with contextlib.suppress(Error):
        parse(text)


def test_a_name_that_is_none_is_answered_with_near_ones(catalogues):
    for text, by, words in [
        ("spärlich > 1", {}, "did you mean 'Spärlich'"),
        ("SPÄRLICH > 1", {}, "did you mean 'Spärlich'"),
        ("EPOCH > 1", {}, "did you mean 'epoch'"),
        ("val > 1", {}, "write metric('val/loss')"),
        ("", {"acx": "max"}, "did you mean 'acc'"),
        ("stepp > 1", {}, "did you mean 'step'"),
        ("has(nothing)", {}, "metrics: Spärlich, acc, epoch"),
        ("config.opt.nam == 'x'", {}, "no run has a setting config.opt.nam; did you mean 'config.opt.name'"),
        ("lr > 0.1", {}, "no checkpoint has a metric 'lr'; did you mean 'config.lr'?"),
        ("config.n > 1", {}, "settings: config.amp, config.lr"),
    ]:
        with pytest.raises(NotFoundError, match=re.escape(words)):
            select(catalogues[0], text, by)
    with pytest.raises(ConfigError, match="run is not a number to rank by"):
        select(catalogues[0], "", {"run": "max"})
    with pytest.raises(ConfigError, match="mode must be"):
        select(catalogues[0], "", {"acc": "best"})
    for top in (0, True, 1.5, 10**30):
        with pytest.raises(ConfigError, match="from 1 to"):
            select(catalogues[0], "", top=top)


def test_every_field_has_a_meaning(made, catalogues):
    for catalogue in catalogues:
        for field, kind in FIELDS.items():
            condition = {"text": f"{field} ~ '*'", "truth": f"{field} or not {field}"}.get(kind, f"has({field})")
            assert len(list(select(catalogue, condition))) == {"epoch": 48, "alias": 2, "tag": 40}.get(field, 60)


# --- the second lock ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM peakpoint_runs",
        "UPDATE peakpoint_meta SET tick = 0",
        "DROP TABLE peakpoint_runs",
        "ATTACH DATABASE '/tmp/x' AS y",
        "PRAGMA query_only=OFF",
        "PRAGMA writable_schema=ON",
        "SELECT load_extension('x')",
        "SELECT readfile('/etc/passwd')",
        "CREATE TEMP TABLE x (y)",
        "VACUUM INTO '/tmp/x'",
        "SELECT randomblob(100)",
    ],
)
def test_the_connection_that_selects_can_do_nothing_else(catalogues, statement):
    with catalogues[0]._reading.connect() as connection, pytest.raises(sqlalchemy.exc.DatabaseError) as caught:
        connection.exec_driver_sql(statement)
    assert isinstance(caught.value.orig, sqlite3.DatabaseError)


@pytest.mark.parametrize(
    "statement", ["DELETE FROM peakpoint_runs", "DROP TABLE peakpoint_runs", "CREATE TABLE x (y int)"]
)
def test_nor_can_the_one_of_postgresql(catalogues, statement):
    with catalogues[1]._reading.connect() as connection, pytest.raises(sqlalchemy.exc.DBAPIError, match="read-only"):
        connection.exec_driver_sql(statement)
