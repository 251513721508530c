"""Power cuts on real file systems: all that is not on the disk is dropped in the middle of a training."""

import array
import fcntl
import os
import shutil
import subprocess
import sys

import pytest

import peakpoint as pp
from peakpoint.repository import audit

SHUTDOWN, WITHOUT_FLUSHING = 0x8004587D, 2  # of ext4 and XFS: nothing of the journal is written any more
SAVES = 6  # acknowledged before the power is cut

TRAINING = """
import sys
import torch
import peakpoint as pp
state = {"model": {"w": torch.zeros(300_000)}, "fixed": {"w": torch.ones(100_000)}}
rules = [pp.Best("loss", "min"), pp.Last(2)]
with pp.Checkpointer(sys.argv[1], run="r", state=state, keep=rules, preempt=None) as ckpt:
    for step in ckpt.steps(100_000):
        state["model"]["w"].fill_(step + 1.0)
        ckpt.report(loss=1 / (step + 1 + 3 * (step % 2)))
        ckpt.wait()
        print(step + 1, flush=True)
"""


@pytest.fixture(params=[["mkfs.ext4", "-q"], ["mkfs.xfs", "-q"]], ids=["ext4", "xfs"])
def disk(request, tmp_path):
    """A file system in a file; mounts it anew, without the writes that were not durable."""
    if os.getuid() != 0 or shutil.which(request.param[0]) is None:
        pytest.skip("needs root and the tools of the file system")
    image, point = tmp_path / "image", tmp_path / "disk"
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(400 * 2**20)  # XFS takes no less than 300 MiB
    subprocess.run([*request.param, image], check=True, capture_output=True)

    mount = ["mount", "-o", "loop", image, point]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("the system cannot mount such a file system")

    def mount_again():
        subprocess.run(["umount", point], check=True)
        subprocess.run(mount, check=True)

    yield point, mount_again
    subprocess.run(["umount", "--lazy", point], check=True)


def cut_power(point):
    fd = os.open(point, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, SHUTDOWN, array.array("I", [WITHOUT_FLUSHING]))
    finally:
        os.close(fd)


def check(root, acknowledged):
    """All that was acknowledged is there, whole; what is loaded is let go of, so that the disk can be unmounted."""
    repository = pp.open(root)
    assert audit.audit(repository, deep=True).of_kind("damage") == []
    newest = repository.run("r").checkpoints()[-1]
    assert newest.step >= acknowledged
    assert pp.load("r@latest", root=root)["model"]["w"].unique().tolist() == [float(newest.step)]
    audit.clean(repository)
    assert audit.audit(repository, deep=True).clean


@pytest.mark.slow
def test_what_was_acknowledged_survives_power_cuts_of_a_real_file_system(disk):
    point, mount_again = disk
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", TRAINING, point / "runs"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as training:
            acknowledged = [int(training.stdout.readline()) for _ in range(SAVES)]
            cut_power(point)  # in the middle of the save that follows
            training.kill()
        mount_again()
        check(point / "runs", acknowledged[-1])
