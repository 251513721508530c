"""Releases: select, validate, compare and promote by a policy; refused for a reason; repeated without harm."""

import contextlib
import json
import os
import shutil
import socketserver
import sqlite3
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

import peakpoint as pp
import production_task as task
from peakpoint.catalogue import Catalogue
from peakpoint.cli.main import cli
from peakpoint.errors import ConfigError, RefusedError, SignatureError, StoreError
from peakpoint.production import hooks, promotion
from peakpoint.production.policy import read_policies
from peakpoint.production.proposal import propose
from peakpoint.production.release import Release
from peakpoint.reports import changelog
from peakpoint.repository import aliases, audit, validations
from peakpoint.repository.releases import read_release, release_ids
from peakpoint.store import LocalStore

pytestmark = pytest.mark.usefixtures("processes_have_torch")


def released(root, alias="champion", **options):
    found = pp.open(root)
    return Release(found, alias, read_policies(found.store), task.in_process, **options).run()


def champion(root):
    return pp.open(root).find("@champion").step


def test_a_release_selects_validates_compares_and_promotes(tmp_path):
    found = task.trained(tmp_path)
    task.policy(tmp_path)
    done = released(tmp_path, why="the release of today")
    assert done.outcome == "promoted"
    assert [step.name for step in done.steps] == ["select", "validate", "compare", "promote"]
    assert champion(tmp_path) == 2
    record = done.record
    assert (record.why, record.release, record.forced, record.comparison) == ("the release of today", done.id, (), None)
    assert record.validation == validations.newest(found.store, "r", found.find("r:2").id).digest
    assert aliases.newest(found.store, "champion") == record
    assert record.decision["policy"] == (tmp_path / "production.toml").read_text()
    assert [step["name"] for step in record.decision["steps"]] == ["select", "validate", "compare"]
    assert record.decision["steps"][0]["said"] == done.steps[0].said
    assert release_ids(found.store) == [], "the record of the alias is the only one"


def test_a_release_is_idempotent(tmp_path):
    found = task.trained(tmp_path)
    task.policy(tmp_path)
    first = released(tmp_path)
    for _ in range(2):
        again = released(tmp_path)
        assert (again.outcome, again.record, again.id) == ("unchanged", first.record, first.id)
    assert len(aliases.history(found.store, "champion").records) == 1
    assert len(validations.readable(found.store, "r", first.candidate.id)[0]) == 1


def test_a_better_one_is_released_next_with_the_comparison_on_record(tmp_path):
    task.trained(tmp_path, noises=(0.9,))
    task.policy(tmp_path, '[champion.improvement]\nmetric = "accuracy"\nmode = "max"\nsignificance = 0.01')
    released(tmp_path)
    task.trained(tmp_path, noises=(0.05,), run="s")
    done = released(tmp_path)
    assert done.outcome == "promoted"
    comparison = done.record.comparison
    assert comparison["champion"].startswith("r/")
    assert comparison["paired"]["examples"] == task.EXAMPLES
    assert comparison["paired"]["p_value"] < 0.01
    former, _ = aliases.history(pp.open(tmp_path).store, "champion").records
    assert former.target.checkpoint == pp.open(tmp_path).find("r:1").id


def test_a_dry_run_changes_nothing_at_all(tmp_path):
    task.trained(tmp_path)
    task.policy(tmp_path)

    def tree():
        return {
            str(path): path.read_bytes()
            for path in tmp_path.rglob("*")
            if path.is_file() and "catalogue" not in path.name
        }

    before = tree()
    assert released(tmp_path, dry_run=True).outcome == "would validate"
    assert tree() == before
    found = pp.open(tmp_path)
    wanted = read_policies(found.store).of("champion").wanted
    task.in_process(found, "r:2", wanted, alias="champion", timeout=None, progress=lambda _: None)
    before = tree()
    assert released(tmp_path, dry_run=True).outcome == "would promote"
    assert tree() == before


def test_nothing_fits(tmp_path):
    task.trained(tmp_path)
    task.policy(tmp_path, 'select = "accuracy > 1"')
    done = released(tmp_path)
    assert (done.outcome, done.reasons) == ("nothing fits", ("no checkpoint meets the condition of the policy",))


def test_a_release_needs_a_policy_that_says_what_to_select(tmp_path):
    task.trained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"does not exist, and so has no table \[champion\].*begins with format = 1; tables: none"
    ):
        released(tmp_path)
    (tmp_path / "production.toml").write_text('format = 1\n[champion]\nmay_promote = ["x"]')
    with pytest.raises(ConfigError, match="says nothing of what to select"):
        released(tmp_path)
    task.policy(tmp_path)
    with pytest.raises(ConfigError, match=r'no table \["a/champoin"\].*tables: champion'):
        released(tmp_path, "a/champoin")


def test_records_of_releases_that_earlier_versions_wrote_are_shown_beside_new_ones(tmp_path):
    found = task.trained(tmp_path)
    task.policy(tmp_path)
    done = released(tmp_path)
    stored = Path(__file__).parents[1] / "data/format-1/releases/56c2f0fd97bed237.json"
    (tmp_path / "releases").mkdir()
    shutil.copy(stored, tmp_path / "releases")
    assert release_ids(found.store) == ["56c2f0fd97bed237"]
    old = read_release(found.store, "56c2f0fd97bed237")
    assert (old.outcome, old.record, old.steps[1]["said"]) == (
        "refused",
        None,
        "validation 1 of 2026-01-01 12:05 UTC passed",
    )
    refused, promoted = changelog.entries(found, kinds=["refused", "promoted"])
    assert (refused.kind, refused.why, refused.details["release"]) == ("refused", old.reasons[0], old.id)
    assert (promoted.kind, promoted.details["release"]) == ("promoted", done.id)
    (shown,) = json.loads(command("history", tmp_path, "champion", "--json"))["records"]
    assert (shown["release"], shown["decision"]["steps"][0]["name"]) == (done.id, "select")
    assert audit.audit(found, deep=True).clean


# --- what is refused ----------------------------------------------------------------------------------------------


def refused(root, *says):
    """Both by a release and by hand."""
    done = released(root)
    assert done.outcome == "refused"
    for text in says:
        assert any(text in reason for reason in done.reasons), done.reasons
    assert aliases.names(pp.open(root).store) == []
    again = released(root)
    assert (again.outcome, again.reasons, again.id) == ("refused", done.reasons, done.id)
    found = pp.open(root)
    proposal = propose(found, done.candidate.ref, "champion", policy=read_policies(found.store).of("champion"))
    with pytest.raises(RefusedError) as caught:
        promotion.promote(proposal, "by hand")
    assert set(done.reasons) <= set(caught.value.reasons)
    return done


def test_a_flipped_bit(tmp_path):
    found = task.trained(tmp_path)
    task.policy(tmp_path)
    path = found.find("r:2").path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(tmp_path, "its last validation failed: integrity: ", "model.safetensors")


def test_weights_that_are_nan(tmp_path):
    model = task.noisy(0.1)
    with task.checkpointer(tmp_path, state={"model": model}) as ckpt:
        with torch.no_grad():
            model.weight[0, 0] = torch.nan
        ckpt.report(step=1, accuracy=0.99)
    task.policy(tmp_path)
    refused(tmp_path, "its last validation failed: finite: ", "weight")


def test_an_accuracy_that_the_evaluation_does_not_confirm(tmp_path):
    task.trained(tmp_path, said=(0.5, 0.999, 0.5))
    task.policy(tmp_path, validation="tolerance = 0.001")
    refused(tmp_path, "its last validation failed: metrics: accuracy is ", "recorded as 0.999")


def test_one_that_is_too_slow(tmp_path):
    task.trained(tmp_path)
    from safetensors.torch import save_file

    save_file({"inputs": task.data()[0]}, tmp_path / "golden.safetensors")
    task.policy(tmp_path, validation='golden = "golden.safetensors"\nbudgets = { latency_ms = 0.000001 }')
    refused(tmp_path, "its last validation failed: budget latency_ms: ")


def test_a_check_of_the_users_own(tmp_path):
    task.trained(tmp_path)
    task.policy(tmp_path, validation='checks = ["production_task:raises"]')
    refused(tmp_path, "its last validation failed: production_task:raises: ", "a check of ours")


def test_an_improvement_that_may_be_chance(tmp_path):
    task.trained(tmp_path, noises=(0.12,))
    task.policy(tmp_path, '[champion.improvement]\nmetric = "accuracy"\nmode = "max"\nsignificance = 0.0001')
    released(tmp_path)
    better = [seed for seed in range(2, 60) if task.accuracy(task.noisy(0.12, seed)) > champion_accuracy(tmp_path)]
    model = task.noisy(0.12, better[0])
    with task.checkpointer(tmp_path, run="s", state={"model": model}) as ckpt:
        ckpt.report(step=1, accuracy=task.accuracy(model))
    done = released(tmp_path)
    assert done.outcome == "refused"
    assert "which may be chance" in done.reasons[0]
    assert champion(tmp_path) == 1


def champion_accuracy(root):
    return pp.open(root).find("@champion").metrics["accuracy"]


def key_pair(directory, name):
    private = ec.generate_private_key(ec.SECP256R1())
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (directory / name).write_bytes(pem)
    public = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (directory / f"{name}.pub").write_bytes(public)
    return directory / name


@pytest.fixture
def key(tmp_path_factory):
    return key_pair(tmp_path_factory.mktemp("keys"), "release")


def signing(key):
    return f'[champion.signing]\npublic_key = "{key}.pub"'


def test_one_that_is_unsigned_or_signed_by_somebody_else(tmp_path, key):
    from peakpoint.repository.signing import sign

    found = task.trained(tmp_path)
    task.policy(tmp_path, signing(key))
    refused(tmp_path, "the policy asks for a signature: ", "is not signed")
    other = key_pair(key.parent, "other")
    sign(found.store, found.find_manifest("r:2"), private_key=other)
    done = released(tmp_path)
    assert done.outcome == "refused"
    assert "is not validly signed with the key" in done.reasons[0]
    assert released(tmp_path, private_key=other).outcome == "refused", "a key that the policy does not name"
    assert "the policy asks for signatures by" in command("release", tmp_path, "--key", other, code=16)
    assert released(tmp_path, private_key=key).outcome == "promoted"


def test_a_release_signs_once_and_loading_by_the_alias_verifies(tmp_path, key):
    task.trained(tmp_path)
    task.policy(tmp_path, signing(key))
    done = released(tmp_path, private_key=key)
    assert [step.name for step in done.steps] == ["select", "validate", "compare", "sign", "promote"]
    assert released(tmp_path, private_key=key).outcome == "unchanged"
    path = done.candidate.path
    assert len(list(path.glob("signature-*.json"))) == 1
    assert task.accuracy(task.noisy(0.1, 2)) == pytest.approx(champion_accuracy(tmp_path))
    model = task.build()
    pp.load("@champion", root=tmp_path, into=model)
    (path / "signature-1.json").unlink()
    with pytest.raises(SignatureError, match="is not signed"):
        pp.load("@champion", root=tmp_path, into=model)
    assert pp.load("r:2", root=tmp_path, into=model), "the policy is about the alias"
    with pytest.raises(ConfigError, match="needs verify=True"):
        pp.load("@champion", root=tmp_path, verify=False)


# --- after a roll back --------------------------------------------------------------------------------------------


def test_what_was_rolled_back_does_not_come_back_by_itself(tmp_path):
    task.trained(tmp_path, noises=(0.9,))
    task.policy(tmp_path)
    released(tmp_path)
    task.trained(tmp_path, noises=(0.05, 0.6), run="s")
    released(tmp_path)
    promotion.rollback(pp.open(tmp_path), "champion", "customers complained")
    done = released(tmp_path)
    assert done.steps[0].said.startswith("passed over s/")
    assert "customers complained" in done.steps[0].said
    assert done.steps[1].said.endswith("it is older than the last rollback")
    assert (done.outcome, done.candidate.run) == ("unchanged", "r"), "the best that is left is the champion"
    task.trained(tmp_path, noises=(0.3,), run="t")
    assert released(tmp_path).candidate.run == "t", "what came after the roll back may follow it"
    task.trained(tmp_path, noises=(0.4,), run="u")
    assert released(tmp_path).outcome == "unchanged"
    found = pp.open(tmp_path)
    promotion.promote(propose(found, "s:1", "champion"), "it was not its fault", force=True)
    assert released(tmp_path).candidate.ref == found.find("s:1").ref


# --- hooks --------------------------------------------------------------------------------------------------------


class Hook(HTTPServer):
    """Takes changes on loopback, or refuses them."""

    def __init__(self):
        self.code, self.bodies = 200, []
        super().__init__(("127.0.0.1", 0), self.Answer)
        self.url = f"http://127.0.0.1:{self.server_port}/changed"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self):
            self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(self.server.code)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            """Nothing."""


@pytest.fixture
def hook():
    server = Hook()
    yield server
    server.shutdown()
    server.server_close()


def test_hooks_are_told_of_each_change_once_they_take_it(tmp_path, hook):
    task.trained(tmp_path)
    log = tmp_path / "log"
    task.policy(
        tmp_path,
        f'[[champion.hooks]]\ncommand = ["sh", "-c", "cat >> {log}"]\n[[champion.hooks]]\nurl = "{hook.url}"',
    )
    hook.code = 503
    done = released(tmp_path)
    assert done.outcome == "promoted"
    assert [one.error for one in done.hook_results] == [None, "it answered 503 Service Unavailable"]
    hook.code = 200
    assert [one.error for one in released(tmp_path).hook_results] == [None, None]
    assert released(tmp_path).hook_results == ()
    change = hook.bodies[-1]
    assert json.loads(log.read_text()[: len(log.read_text()) // 2]) == change
    assert (change["alias"], change["record"], change["kind"]) == ("champion", 1, "promoted")
    assert change["ref"] == done.record.target.ref
    assert change["digest"] == done.record.digest
    assert change["repository"] == str(tmp_path)


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (["sh", "-c", "echo no such machine; exit 3"], "it ended with 3: no such machine"),
        (["no-such-program"], "it cannot be run: No such file or directory"),
        (["sleep", "60"], "it took longer than 0.2 s and was stopped"),
        (["yes"], "it took longer than 0.2 s and was stopped"),
        (["sh", "-c", "trap '' TERM; sleep 60 & wait"], "it took longer than 0.2 s and was stopped"),
    ],
)
def test_a_hook_that_fails_says_how(tmp_path, command, error):
    found = task.trained(tmp_path, noises=(0.1,))
    task.policy(tmp_path, f'[[champion.hooks]]\ncommand = {json.dumps(command)}\ntimeout = "200ms"')
    policy = read_policies(found.store).of("champion")
    record = promotion.promote(propose(found, "r:1", "champion"), "x", force=True)
    assert [one.error for one in hooks.tell(found.store, record, policy)] == [error]
    assert hooks.are_due(found.store, record, policy)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_an_address_that_has_moved_has_not_been_told(tmp_path, hook, code):
    found = task.trained(tmp_path, noises=(0.1,))
    task.policy(tmp_path, f'[[champion.hooks]]\nurl = "{hook.url}"')
    hook.code = code
    policy = read_policies(found.store).of("champion")
    record = promotion.promote(propose(found, "r:1", "champion"), "x", force=True)
    (told,) = hooks.tell(found.store, record, policy)
    assert told.error.startswith(f"it answered {code}")
    assert hooks.are_due(found.store, record, policy)


def test_what_a_hook_prints_is_thrown_away_before_it_fills_the_disk(tmp_path):
    found = task.trained(tmp_path, noises=(0.1,))
    printed = 'yes | head -c 4000000; until [ "$(stat -L -c %b /proc/$$/fd/1)" -lt 1000 ]; do :; done'
    task.policy(tmp_path, f"[[champion.hooks]]\ncommand = {json.dumps(['sh', '-c', printed])}")
    record = promotion.promote(propose(found, "r:1", "champion"), "x", force=True)
    (told,) = hooks.tell(found.store, record, read_policies(found.store).of("champion"))
    assert told.error is None


class Endless(socketserver.StreamRequestHandler):
    """Says something again and again, and never answers."""

    def handle(self):
        with contextlib.suppress(OSError):  # nobody listens any more
            while True:
                self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")


class Deaf(socketserver.StreamRequestHandler):
    """Neither reads nor answers."""

    def handle(self):
        self.server.left.wait()


@pytest.mark.parametrize("answer", [Endless, Deaf])
def test_the_time_of_an_address_is_that_of_the_whole_call(tmp_path, answer):
    found = task.trained(tmp_path, noises=(0.1,))
    record = promotion.promote(propose(found, "r:1", "champion"), "x" * 10_000_000, force=True)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), answer) as server:
        server.left = threading.Event()
        threading.Thread(target=server.handle_request, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/changed"
        task.policy(tmp_path, f'[[champion.hooks]]\nurl = "{url}"\ntimeout = "2s"')
        (told,) = hooks.tell(found.store, record, read_policies(found.store).of("champion"))
        server.left.set()
    assert told.error == "it took longer than 2 s and was stopped"


class NoHttp(socketserver.StreamRequestHandler):
    def handle(self):
        self.rfile.readline()
        self.wfile.write(b"220 mail.example.org\r\n")


def test_an_address_where_nobody_speaks_http(tmp_path):
    found = task.trained(tmp_path, noises=(0.1,))
    record = promotion.promote(propose(found, "r:1", "champion"), "x", force=True)
    with socketserver.TCPServer(("127.0.0.1", 0), NoHttp) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        for url in (f"http://127.0.0.1:{server.server_address[1]}/changed", "http://127.0.0.1/with a space"):
            task.policy(tmp_path, f'[[champion.hooks]]\nurl = "{url}"')
            told = hooks.tell(found.store, record, read_policies(found.store).of("champion"))
            assert told[0].error.startswith("it cannot be reached")


def test_an_address_that_nobody_answers_at(tmp_path, hook):
    found = task.trained(tmp_path, noises=(0.1,))
    hook.server_close()
    task.policy(tmp_path, f'[[champion.hooks]]\nurl = "{hook.url}"')
    policy = read_policies(found.store).of("champion")
    record = promotion.promote(propose(found, "r:1", "champion"), "x", force=True)
    (told,) = hooks.tell(found.store, record, policy)
    assert told.error.startswith("it cannot be reached")


# --- the command line ---------------------------------------------------------------------------------------------


def command(*arguments, code=0):
    done = CliRunner().invoke(cli, list(map(str, arguments)), standalone_mode=False)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        assert getattr(done.exception, "exit_code", 1) == code, done.exception
        return str(done.exception)
    assert done.exit_code == code, done.output
    return done.output


def test_the_whole_way_at_the_command_line(tmp_path):
    task.trained(tmp_path / "runs")
    root = tmp_path / "runs"
    said = command("promote", root, "r:1", "--as", "champion", "--why", "first", code=16)
    assert "it was never validated" in said
    said = command("promote", root, "r:1", "--as", "champion", "--why", "x", "--dry-run", code=16)
    assert "would be refused" in said
    found = pp.open(root)
    for step in (1, 2):
        task.in_process(
            found,
            f"r:{step}",
            validations.ValidationSpec(evaluate="production_task:evaluate", model="production_task:build"),
            alias="champion",
            timeout=None,
            progress=lambda _: None,
        )
        said = command("promote", root, f"r:{step}", "--as", "champion", "--why", f"step {step}")
        assert f"(record {step})" in said
    assert "McNemar's test p =" in said
    assert "fixes (wrong before, right now)" in said
    assert "No change: champion is" in command("promote", root, "r:2", "--as", "champion", "--why", "x")
    assert f"Rolled back: champion is {found.find('r:1').ref} again" in command("rollback", root, "champion")
    assert "3 records, none changed or missing" in command("history", root, "champion")
    assert found.find("r:1").ref in command("history", root)
    command("promote", root, "r:3", "--as", "challenger_1", "--why", "try it", "--force")
    assert "FORCED although it was never validated" in command("history", root, "challenger_1")
    assert "Cleared: challenger_1 (record 2)" in command(
        "promote", root, "--retire", "challenger_1", "--why", "it lost"
    )
    assert "is never without a checkpoint" in command("promote", root, "--retire", "champion", "--why", "x", code=2)
    assert "pointed at no checkpoint yet" in command("history", root, "champion", "--at", "2020-01-01", code=10)
    assert json.loads(command("history", root, "champion", "--at", "2100-01-01", "--json"))["records"][0]["number"] == 3
    names = [one["alias"] for one in json.loads(command("history", root, "--json"))["aliases"]]
    assert names == ["challenger_1", "champion"]


def test_a_release_at_the_command_line_says_why_not(tmp_path):
    root = tmp_path / "runs"
    task.trained(root)
    task.policy(root, 'may_promote = ["somebody else"]')
    said = command("release", root, code=16)
    assert "blocked: " in said
    assert "may not change champion: the policy allows somebody else" in said
    found = json.loads(command("release", root, "--json", code=16))
    assert (found["outcome"], len(found["reasons"]), found["record"]) == ("refused", 1, None)
    (root / "production.toml").write_text("format = 1\n[champion]\nrnak = []\n")
    assert "there is no entry 'rnak'; did you mean 'rank'" in command("release", root, code=2)


def test_validating_by_hand_checks_what_the_policy_asks_for(tmp_path):
    root = tmp_path / "runs"
    found = task.trained(root, noises=(0.1,))
    task.policy(root, validation="budgets = { parameters = 5 }")
    assert "did not pass: budget parameters" in command("validate", root, "r:1", code=16)
    refused = command("release", root, code=16).replace("\n", " ")
    assert refused.count("To validate it again: ") == 1
    assert "The next best checkpoint is not tried." in refused
    (root / "production.toml").write_text((root / "production.toml").read_text().replace("= 5 }", "= 50 }"))
    command("validate", root, "r:1")
    policy = read_policies(found.store).of("champion")
    assert propose(found, "r:1", "champion", policy=policy).objections == ()
    command("validate", root, "r:1", "--sparsity", "pruned")
    objections = propose(found, "r:1", "champion", policy=policy).objections
    assert objections[0].startswith(
        "its validation differs from what the policy asks in evaluate, model, budgets, sparsity"
    )


def test_history_says_when_a_record_was_changed(tmp_path):
    found = task.trained(tmp_path)
    for step in (1, 2, 3):
        promotion.promote(propose(found, f"r:{step}", "champion"), "x", force=True)
    (tmp_path / "aliases/champion/000002.json").unlink()
    done = CliRunner().invoke(cli, ["history", str(tmp_path), "champion"])
    assert done.exit_code == 12
    assert "000002.json is missing" in done.output


def test_a_record_that_is_cut_off_hides_no_other_alias(tmp_path):
    found = task.trained(tmp_path)
    for alias in ("champion", "other"):
        promotion.promote(propose(found, "r:1", alias), "x", force=True)
    path = tmp_path / "aliases/champion/000001.json"
    path.write_bytes(path.read_bytes()[:-30])
    done = CliRunner().invoke(cli, ["history", str(tmp_path)])
    assert done.exit_code == 12
    assert "champion: aliases/champion/000001.json is corrupt" in done.output
    assert "r/step1" in done.output


def test_a_holder_that_was_evaluated_otherwise_is_evaluated_again(tmp_path):
    found = task.trained(tmp_path, noises=(0.9,))
    promotion.promote(propose(found, "r:1", "champion"), "by hand", force=True)
    task.policy(tmp_path, '[champion.improvement]\nmetric = "accuracy"\nmode = "max"\nsignificance = 0.01')
    task.trained(tmp_path, noises=(0.05,), run="s")
    done = released(tmp_path)
    assert done.outcome == "promoted", done.reasons
    assert len(validations.readable(found.store, "r", found.find("r:1").id)[0]) == 1
    assert done.record.comparison["paired"]["examples"] == task.EXAMPLES


class Refusing(LocalStore):
    """Raises an input/output error for keys that end so, so many times."""

    where, times = None, 0

    def get(self, key, begin=0, end=None, **limits):
        if self.where is not None and key.endswith(self.where) and self.times > 0:
            self.times -= 1
            raise StoreError(5, f"cannot read {key}: Input/output error")
        return super().get(key, begin, end, **limits)


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("what", ["disk", "damage", "manifest", "directory"])
def test_nothing_is_promoted_while_something_cannot_be_read(tmp_path, what, dry_run):
    task.trained(tmp_path)
    task.policy(tmp_path)
    best = pp.open(tmp_path).find("r:2")
    Catalogue(tmp_path).refresh()
    store, file = Refusing(tmp_path), best.path / "manifest.json"
    if what == "disk":
        store.where, store.times = f"{best.name}/manifest.json", 99
    elif what == "manifest":
        file.unlink()
    elif what == "directory":
        shutil.rmtree(best.path)
    else:
        file.write_bytes(file.read_bytes().replace(b'"step"', b'"stop"'))
    found = pp.open(store)
    with pytest.warns(pp.PeakpointWarning, match="is left out"):
        done = Release(found, "champion", read_policies(store), task.in_process, dry_run=dry_run).run()
    assert (done.outcome, done.id, done.candidate, done.record) == ("refused", None, None, None)
    assert "cannot be read, and may be better" in done.reasons[0]
    assert aliases.numbers(store, "champion") == []
    if what != "disk":
        assert f"peakpoint rm {tmp_path} {best.run}/{best.name} --undo-for 0" in done.reasons[0]
        command("rm", tmp_path, best.ref, "--undo-for", "0", "--yes")
        done = Release(found, "champion", read_policies(store), task.in_process, dry_run=dry_run).run()
        assert done.candidate.step != best.step


def test_a_release_is_not_deceived_by_a_damaged_index(tmp_path):
    task.trained(tmp_path)
    task.policy(tmp_path)
    for directory, _, _ in os.walk(tmp_path):
        os.utime(directory, (1, 1))  # long ago, so that nothing is read again
    catalogue = Catalogue(tmp_path)
    catalogue.refresh()
    best = pp.open(tmp_path).find("r:2")
    with contextlib.closing(sqlite3.connect(tmp_path / "catalogue.sqlite")) as connection:
        connection.execute("DELETE FROM peakpoint_checkpoints WHERE step = ?", (best.step,))
        connection.commit()
    with pytest.warns(pp.PeakpointWarning, match="differed from the files .* and was made anew"):
        assert released(tmp_path).candidate.id == best.id
    assert champion(tmp_path) == best.step
