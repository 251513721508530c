"""The commit of the training's code, as git tells it; without git a training goes on all the same."""

import json
import os
import subprocess
import sys

import pytest

import peakpoint as pp
from peakpoint.format.events import Opened
from peakpoint.repository.provenance import code_version
from peakpoint.rules.history import newest_event


def git(directory, *words):
    names = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", "-C", directory, *names, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    code = tmp_path / "code"
    code.mkdir()
    git(code, "init", "-q")
    (code / "train.py").write_text("print(1)\n")
    git(code, "add", "train.py")
    git(code, "commit", "-qm", "first")
    return code


def test_a_commit_and_what_is_not_in_it(repository):
    commit = git(repository, "rev-parse", "HEAD")
    assert code_version(repository) == commit
    (repository / "notes.txt").write_text("of no concern to git\n")
    (repository / "deep").mkdir()
    assert code_version(repository / "deep") == commit
    (repository / "train.py").write_text("print(2)\n")
    assert code_version(repository / "deep") == f"{commit}-dirty"
    git(repository, "add", "train.py")
    assert code_version(repository) == f"{commit}-dirty"
    git(repository, "commit", "-qm", "second")
    assert code_version(repository) == git(repository, "rev-parse", "HEAD") != commit


def test_another_repository_in_the_environment_is_not_ours(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert len(code_version(repository)) == 40


def test_no_repository_no_commit_no_directory(tmp_path):
    assert code_version(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert code_version(tmp_path) is None
    assert code_version(tmp_path / "missing") is None


def test_no_git(repository, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert code_version(repository) is None


def test_a_git_that_does_not_answer(repository, tmp_path, monkeypatch):
    slow = tmp_path / "git"
    slow.write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_version(repository, patience=0.05) is None


def test_it_takes_no_lock_and_changes_nothing(repository):
    lock = repository / ".git" / "index.lock"
    lock.touch()
    before = (repository / ".git" / "index").read_bytes()
    os.utime(repository / "train.py", (1, 1))  # git would like to note that
    assert code_version(repository) == git(repository, "rev-parse", "HEAD")
    assert (repository / ".git" / "index").read_bytes() == before
    assert lock.exists()


def test_records_have_it(repository, tmp_path):
    (repository / "train.py").write_text(
        "import sys, peakpoint as pp\n"
        "with pp.Checkpointer(sys.argv[1], run='r', state={'x': 1}, keep=[pp.Last(1)]) as ckpt:\n"
        "    ckpt.report(step=1)\n"
    )
    root = tmp_path / "runs"
    subprocess.run([sys.executable, repository / "train.py", root], check=True, cwd=tmp_path, capture_output=True)
    code = git(repository, "rev-parse", "HEAD") + "-dirty"
    run = pp.open(root).run("r")
    assert run.manifests()[0].written_by["code"] == code
    assert newest_event(run.events(), Opened).by["code"] == code
    assert json.loads((root / "runs" / "r" / "run.json").read_text())["by"]["code"] == code
