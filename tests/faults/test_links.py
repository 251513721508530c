"""What is no file or directory of ours: named, refused unread, never followed, changed or removed."""

import contextlib
import os
import shutil
import stat
import sys
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner

import peakpoint as pp
from peakpoint.cli.main import cli
from peakpoint.repository.audit import audit, clean
from peakpoint.store import LocalStore
from promoting import validated
from training import checkpointer
from validated import crown

PRECIOUS = ("model.safetensors", "state.json", ".tmp-notes", "000001.json", "0123456789abcdef.pack", "readme.md")
HUGE = 2**40


def save(root, run="r", epochs=3):
    with checkpointer(root, run=run, state={"model": {"w": 1.0}, "more": 2}, keep=[pp.Last(9)]) as ckpt:
        for _ in ckpt.epochs(epochs):
            ckpt.report(acc=0.5)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A repository with a record of every kind."""
    root = tmp_path_factory.mktemp("links") / "runs"
    save(root)
    crown(root, "r:epoch=1")
    validated(pp.open(root), "r:epoch=1", predicted=[0, 1], labels=[0, 1])
    save(root, run="packed", epochs=2)
    for arguments in (
        ["archive", root, "packed"],
        ["rm", root, "r:epoch=0", "--yes", "--undo-for", "24h"],
        ["select", root],
        ["pin", root, "r:epoch=2", "--why", "kept"],
    ):
        done = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    (root / "production.toml").write_text('format = 1\n[champion]\nrank = ["max acc"]\n')
    (root / "releases").mkdir()
    return root


COMMANDS = (
    ("ls",),
    ("select",),
    ("record", "r@latest", "x=1"),
    ("promote", "r:epoch=1", "--as", "champion", "--force", "--yes", "--why", "because"),
    ("undo", "r/epoch0_step1"),
    ("keep", "r", "--yes", "--rules", "last:1"),
    ("rm", "r:epoch=2", "--yes", "--undo-for", "0"),
    ("archive", "r"),
    ("archive", "packed", "--restore"),
    ("undo", "--empty", "--yes"),
    ("audit", "--clean"),
)


def tried(root):
    """Try everything that reads and everything that changes; only errors of ours may come of it."""
    for command, *arguments in COMMANDS:
        done = CliRunner().invoke(cli, [command, str(root), *arguments])
        assert isinstance(done.exception, None | SystemExit | pp.Error), (command, done.exc_info)
    for work in (
        lambda: save(root, epochs=5),
        lambda: save(root, run="packed", epochs=5),
        lambda: validated(pp.open(root), "r@latest", predicted=[0, 1], labels=[0, 1]),
    ):
        with contextlib.suppress(pp.Error):
            work()


def content(path):
    """Everything below a path, and the path itself, without following links."""
    status = path.lstat()
    if stat.S_ISDIR(status.st_mode):
        return {child.name: content(child) for child in path.iterdir()}
    data = path.read_bytes() if stat.S_ISREG(status.st_mode) and status.st_size < HUGE else None
    return status.st_mode, status.st_ino, status.st_size, data


def link(path, outside):
    """To what was there, and files beside it that have names as ours have."""
    if path.is_dir():
        for name in PRECIOUS:
            (path / name).write_text("precious")
    path.rename(outside / "elsewhere")
    path.symlink_to(outside / "elsewhere")


def loop(path, outside):
    path.rename(outside / "elsewhere")
    path.symlink_to(path.name)


def pipe(path, outside):
    path.rename(outside / "elsewhere")
    os.mkfifo(path)


def directory(path, outside):
    path.rename(outside / "elsewhere")
    path.mkdir()
    for name in PRECIOUS:
        (path / name).write_text("precious")


def huge(path, outside):
    path.rename(outside / "elsewhere")
    with path.open("wb") as file:
        file.truncate(HUGE)


def places(made):
    """One name of each kind, and the directories."""
    found = {}
    for path in sorted(made.rglob("*")):
        if "catalogue" not in path.name:
            key = path.relative_to(made)
            kind = (len(key.parts), key.parts[0], key.parts[1:2] == ("packed",), *key.parts[2:3], key.name[-12:])
            if len(key.parts) > 4:
                kind = key.name
            found[kind] = key
    return list(found.values())


@pytest.mark.timeout(280)
@pytest.mark.parametrize(
    "put",
    [link, *(pytest.param(put, marks=pytest.mark.slow) for put in (pipe, loop, directory, huge))],  # minutes
    ids=lambda put: put.__name__,
)
def test_what_is_none_of_ours_is_neither_followed_nor_changed(made, tmp_path, put):
    for number, key in enumerate(places(made)):
        root, outside = tmp_path / f"{number}" / "runs", tmp_path / f"{number}" / "outside"
        shutil.copytree(made, root)
        outside.mkdir()
        if (put in (directory, huge) and (root / key).is_dir()) or (put is huge and key.name == "writer.lock"):
            continue  # of a lock nobody reads more than its first bytes
        put(root / key, outside)
        before = content(outside), content(root / key)
        if key.name not in ("peakpoint.json", "production.toml"):  # without the first there is nothing to audit
            findings = audit(pp.open(root)).findings
            assert findings, key
            if put not in (directory, huge):
                assert [one.where for one in findings if one.kind == "foreign"] == [str(key)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pp.PeakpointWarning)
            tried(root)
        assert content(outside) == before[0], key
        assert put is huge or content(root / key) == before[1], key  # a large file may go with its checkpoint


def test_the_root_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    save(tmp_path / "runs")
    assert len(pp.open(tmp_path / "runs").run("r").checkpoints()) == 3
    assert audit(pp.open(tmp_path / "runs"), deep=True).findings == []


@pytest.mark.parametrize("name", ["runs", "runs/r", "runs/r/checkpoints", "runs/r/journal"])
def test_a_training_into_a_linked_directory_is_refused(tmp_path, name):
    root = tmp_path / "runs"
    save(root)
    (root / name).rename(tmp_path / "elsewhere")
    (root / name).symlink_to(tmp_path / "elsewhere")
    before = content(tmp_path / "elsewhere")
    with pytest.raises(pp.errors.StoreError, match=f"{name.rpartition('/')[2]} is a symbolic link"):
        save(root, epochs=5)
    assert {key: value for key, value in content(tmp_path / "elsewhere").items() if key != "writer.lock"} == {
        key: value for key, value in before.items() if key != "writer.lock"
    }


def test_litter_beside_a_link_goes_and_the_link_stays(tmp_path):
    root, mine = tmp_path / "runs", tmp_path / "models"
    save(root)
    mine.mkdir()
    for name in PRECIOUS:
        (mine / name).write_text("precious")
    checkpoints = root / "runs" / "r" / "checkpoints"
    (checkpoints / "imported").symlink_to(mine)
    (checkpoints / "unfinished").mkdir()
    (checkpoints / "unfinished" / "state.json").write_text("half")
    (checkpoints / "unfinished" / "model.safetensors").symlink_to(mine / "model.safetensors")
    (checkpoints / "unfinished" / ".tmp-x").symlink_to(mine / "state.json")
    clean(pp.open(root))
    assert sorted(content(checkpoints / "unfinished")) == [".tmp-x", "model.safetensors"]
    assert {path.read_text() for path in mine.iterdir()} == {"precious"}
    assert [one.kind for one in audit(pp.open(root)).findings if "imported" in one.where] == ["foreign"]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_the_next_number_is_above_every_name_that_is_there(tmp_path, make):
    root = tmp_path / "runs"
    save(root)
    repository = pp.open(root)
    id_ = repository.find("r@latest").id
    run = root / "runs" / "r"
    (run / "validations" / id_).mkdir(parents=True)
    make(run / "validations" / id_ / "000007.json")
    assert validated(repository, "r@latest").number == 8
    if make is Path.mkdir:  # what is no directory could be a segment, which a reader must not pass over
        make(run / "journal" / "000007.jsonl")
        repository.run("r").pin("r@latest", "because")
        assert (run / "journal" / "000008.jsonl").is_file()


def test_an_alias_whose_next_record_is_a_directory_refuses(tmp_path):
    root = tmp_path / "runs"
    save(root)
    (root / "aliases" / "champion" / "000001.json").mkdir(parents=True)
    with pytest.raises(pp.errors.FormatError, match=r"000001\.json is a directory"):
        crown(root, "r@latest")
    assert [one.where for one in audit(pp.open(root)).findings] == ["aliases/champion/000001.json/"]


@pytest.mark.parametrize("name", ["catalogue.sqlite", "catalogue.sqlite-wal", "catalogue.sqlite-journal"])
def test_the_catalogue_is_not_written_through_a_link(tmp_path, monkeypatch, name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "runs"
    save(root)
    (tmp_path / "mine").write_bytes(b"")
    (root / name).symlink_to(tmp_path / "mine")
    assert len(list(pp.select(root, "acc > 0.1"))) == 3
    assert (tmp_path / "mine").read_bytes() == b""
    assert [(one.kind, one.where) for one in audit(pp.open(root)).findings] == [("foreign", name)]


EXCHANGES = []  # what happens right before a file is opened, once; hooks of an interpreter cannot be taken back


def exchange(event, arguments):
    if event == "open" and EXCHANGES and arguments[0] == "record.json":
        EXCHANGES.pop()()


@pytest.mark.parametrize("verb", ["get", "hold"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_takes_the_place_of_a_file_after_it_was_looked_at_is_neither_followed_nor_waited_for(tmp_path, kind, verb):
    sys.addaudithook(exchange)
    store, outside = LocalStore(tmp_path / "runs"), tmp_path / "outside"
    outside.write_text("precious")
    store.put("record.json", [b"ours"])
    path, done = store.path("record.json"), []

    def act():
        path.unlink()
        path.symlink_to(outside) if kind == "link" else os.mkfifo(path)
        done.append(kind)

    EXCHANGES.append(act)
    with pytest.raises(pp.Error):
        store.get("record.json") if verb == "get" else store.hold("record.json", b"me")
    assert done == [kind]
    assert outside.read_text() == "precious"
