"""Clocks that are wrong: the order of checkpoints, reports and records is that of their numbers."""

from datetime import UTC, datetime, timedelta

import pytest

import peakpoint as pp
from peakpoint.repository import audit, maintenance
from training import checkpointer, kept

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
YEAR = timedelta(days=365)


def at(moment):
    return lambda: moment


@pytest.mark.parametrize("offset", [-YEAR, YEAR], ids=["back", "ahead"])
def test_a_clock_that_jumps_changes_no_order(tmp_path, offset):
    for number, clock in enumerate((at(NOON), at(NOON + offset), at(NOON))):
        with checkpointer(tmp_path, keep=[pp.Last(2), pp.Best("acc", "max")], clock=clock) as ckpt:
            resumed = ckpt.resume()
            assert (0 if resumed is None else resumed.step) == number
            ckpt.report(acc=[0.9, 0.5, 0.1][number])
    assert [checkpoint.step for checkpoint in kept(tmp_path)] == [1, 2, 3]
    assert pp.open(tmp_path).find("r@latest").step == 3
    assert [report.metrics["acc"] for report in pp.open(tmp_path).run("r").history()] == [0.9, 0.5, 0.1]
    assert audit.audit(pp.open(tmp_path), deep=True).clean


def test_the_time_to_undo_is_that_of_the_clock(tmp_path):
    with checkpointer(tmp_path, clock=at(NOON)) as ckpt:
        for _ in range(2):
            ckpt.report()
    run = pp.open(tmp_path).run("r")
    maintenance.remove(run, run.manifests()[:1], "why", undo_for=timedelta(hours=1), clock=at(NOON))
    audit.clean(pp.open(tmp_path), clock=at(NOON - YEAR))
    assert len(maintenance.in_trash(run, clock=at(NOON - YEAR))) == 1  # a clock that went back keeps it longer
    audit.clean(pp.open(tmp_path), clock=at(NOON + YEAR))
    assert maintenance.in_trash(run, clock=at(NOON)) == []  # one that is ahead deletes it early
