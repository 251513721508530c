"""Policies: read strictly, since a policy that is misspelt must not pass for one that asks nothing."""

import contextlib
import re
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peakpoint.catalogue.ranking import WithinSE
from peakpoint.errors import ConfigError
from peakpoint.format.sealed import digest
from peakpoint.production.policy import Hook, Improvement, read_policies, read_text
from peakpoint.repository.validations import ValidationSpec
from peakpoint.store import LocalStore, MemoryStore

WHOLE = """
format = 1

[champion]
select = 'val_accuracy > 0.9 and sparsity >= 0.5'
rank = ["max val_accuracy", "min size"]
within_se = { n_eval = 899 }
may_promote = ["anna", "ci on *"]
keep_last = 5

[champion.validation]
with = "checks:evaluate"
model = "checks:build"
metrics = ["val_accuracy"]
tolerance = 0.01
golden = "golden.safetensors"
agreement = 0.9
budgets = { latency_ms = 20, memory_mb = 500 }
checks = ["checks:no_dead_units"]
signature = { output = "F32[*, 10]" }
max_age = "2d"
timeout = "10min"

[champion.improvement]
metric = "val_accuracy"
mode = "max"
minimum = 0.002
significance = 0.05

[champion.signing]
public_key = "keys/release.pub"

[[champion.hooks]]
command = ["./deploy.sh", "now"]

[[champion.hooks]]
url = "http://127.0.0.1:8080/changed"
timeout = "5s"

["resnet50/champion"]
may_promote = ["bob"]
"""


def read(text, base=Path()):
    return read_text(text.encode(), where="here", base=base)


def test_everything_that_a_policy_can_say(tmp_path):
    found = read(WHOLE, tmp_path)
    policy = found.of("champion")
    assert policy.select == "val_accuracy > 0.9 and sparsity >= 0.5"
    assert list(policy.by.items()) == [("val_accuracy", "max"), ("size", "min")]
    assert policy.within_se == WithinSE(n_eval=899)
    assert policy.keep_last == 5
    assert policy.wanted == ValidationSpec(
        evaluate="checks:evaluate",
        model="checks:build",
        metrics=("val_accuracy",),
        tolerance=0.01,
        golden=str(tmp_path / "golden.safetensors"),
        agreement=0.9,
        budgets={"latency_ms": 20, "memory_mb": 500},
        checks=("checks:no_dead_units",),
        signature={"output": "F32[*, 10]"},
    )
    assert (policy.max_age, policy.timeout) == (timedelta(days=2), 600.0)
    assert policy.improvement == Improvement(metric="val_accuracy", mode="max", minimum=0.002, significance=0.05)
    assert policy.public_key == tmp_path / "keys/release.pub"
    assert policy.hooks == (
        Hook(command=("./deploy.sh", "now")),
        Hook(url="http://127.0.0.1:8080/changed", timeout="5s"),
    )
    assert policy.digest == digest(WHOLE.encode())
    other = found.of("resnet50/champion")
    assert (other.may_promote, other.by, other.improvement, other.public_key) == (("bob",), {}, None, None)
    assert found.of("challenger_1") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[champion]", "must begin with format = 1"),
        ("format = 2", "must begin with format = 1"),
        ("format = 1\n[champion", "is not TOML"),
        ("format = 1\nchampion = 3", r"table \[champion\]: Expected `object`"),
        ("format = 1\n[champion]\nrank = 'max a'", "rank: Expected `array`, got `str`"),
        ('format = 1\n["../x"]', "cannot name an alias"),
        ("format = 1\n[champion]\nselct = 'x'", "there is no entry 'selct'; did you mean 'select'"),
        (
            "format = 1\n[champion.validation]\nevaluate = 'a:b'",
            "there is no entry 'evaluate'.*entries of validation: with, model",
        ),
        ("format = 1\n[[champion.hooks]]\nurll = 'x'", "no entry 'urll'; did you mean 'url'"),
        ("format = 1\n[champion.improvement]\nmetric = 'a'", "missing required field `mode`"),
        ("format = 1\n[champion.improvement]\nmetric = 'a'\nmode = 'up'", "up"),
        ("format = 1\n[champion]\nselect = 'a >'\nrank = ['max a']", "champion"),
        ("format = 1\n[champion]\nselect = 'a > 1'", "does not say which is best"),
        ("format = 1\n[champion]\nrank = ['accuracy']", 'write "max METRIC"'),
        ("format = 1\n[champion]\nrank = ['best accuracy']", "best"),
        ("format = 1\n[champion]\nkeep_last = 0", "keep_last is at least 1"),
        ("format = 1\n[champion.validation]\ntolerance = -1", "the tolerance is a number of at least 0, not -1.0"),
        ("format = 1\n[champion.validation]\ntolerance = nan", "at least 0"),
        ("format = 1\n[champion.validation]\nagreement = 1.5", "from 0 to 1"),
        ("format = 1\n[champion.validation]\nagreement = 0.5", "give them with --golden FILE"),
        ("format = 1\n[champion.validation]\nbudgets = { latency = 1 }", "no budget 'latency'; did you mean"),
        ("format = 1\n[champion.validation]\nmax_age = '0s'", "nothing is done in no time"),
        ("format = 1\n[champion.improvement]\nmetric = 'a'\nmode = 'max'\nsignificance = 1", "lies between 0 and 1"),
        ("format = 1\n[champion.validation]\nmax_age = 'soon'", "not a time span"),
        ("format = 1\n[champion]\nwithin_se = {}", "one standard error of what"),
        ("format = 1\n[[champion.hooks]]", "a hook has either"),
        ("format = 1\n[[champion.hooks]]\ncommand = ['a']\nurl = 'http://x'", "a hook has either"),
        ("format = 1\n[[champion.hooks]]\nurl = 'file:///etc/passwd'", "begins with http"),
    ],
)
def test_what_cannot_be_understood_is_refused_by_name(text, message):
    with pytest.raises(ConfigError, match=f"(?s){'' if 'alias' in message else '^here'}.*{message}"):
        read(text).of("champion")


@given(st.binary())
def test_no_bytes_do_anything_but_be_read_or_refused(data):
    with contextlib.suppress(ConfigError):
        read_text(data, where="here", base=Path("/nowhere")).of("champion")


def test_the_policy_in_the_documentation_can_be_read(tmp_path):
    text = (Path(__file__).parents[2] / "docs/production.md").read_text()
    (block,) = re.findall(r"^```toml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    policy = read(block, tmp_path).of("champion")
    assert policy.improvement.minimum == 0.002
    assert len(policy.hooks) == 2


def test_what_is_wrong_with_a_table_bars_nobody_from_another():
    found = read("format = 1\n[champion]\nrank = ['max a']\n[challenger]\nrnak = []")
    assert found.of("champion").by == {"a": "max"}
    with pytest.raises(ConfigError, match="no entry 'rnak'"):
        found.of("challenger")


def test_a_repository_without_the_file_has_no_policies(tmp_path):
    assert read_policies(MemoryStore()).content == {}
    (tmp_path / "production.toml").write_text("format = 1\n[champion.signing]\npublic_key = 'k.pub'\n")
    found = read_policies(LocalStore(tmp_path))
    assert found.of("champion").public_key == tmp_path / "k.pub"
    assert found.where == f"{tmp_path}/production.toml"


@pytest.mark.parametrize(
    ("patterns", "actor", "allowed"),
    [
        ((), "anybody on any", True),
        (("anna",), "anna on host", True),
        (("anna",), "annabel on host", False),
        (("* on build-*",), "x on build-7", True),
        (("* on build-*",), "x on laptop", False),
        (("ANNA",), "anna on host", False),
    ],
)
def test_who_may_promote(patterns, actor, allowed):
    policy = read(f"format = 1\n[champion]\nmay_promote = {list(patterns)}").of("champion")
    assert policy.allows(actor) is allowed
