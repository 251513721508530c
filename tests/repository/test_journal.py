"""The journal: what was appended is read, what was torn is skipped, what was damaged is named."""

import errno
import itertools
import os
import threading
from datetime import timedelta

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import structs

from peakpoint.errors import CorruptError, StoreError
from peakpoint.format.events import (
    KINDS,
    Archived,
    Changing,
    Closed,
    Measured,
    Opened,
    PartsDropped,
    Pinned,
    Promoted,
    Promoting,
    Removed,
    Reported,
    Restored,
    Saved,
    SaveFailed,
    Started,
    Undone,
    Unpinned,
    Withdrawn,
    decode,
    encode,
)
from peakpoint.format.layout import journal_prefix
from peakpoint.format.sealed import digest, seal
from peakpoint.repository import journal as j
from peakpoint.repository.journal import Journal
from peakpoint.rules.history import history, newest_event
from peakpoint.store import FileOps, LocalStore, MemoryStore
from strategies import START, any_metrics, names, text_tuples, texts, times

naturals = st.integers(0, 2**63 - 1)
ordinals = st.integers(1, 2**63 - 1)
events_of = {
    Opened: st.builds(
        Opened,
        at=times,
        by=st.dictionaries(texts, texts, max_size=2),
        rules=text_tuples,
        state=st.dictionaries(texts, texts, max_size=2),
        config=st.dictionaries(texts, st.none() | st.booleans() | naturals | texts | st.lists(texts), max_size=2),
        tags=text_tuples,
    ),
    Started: st.builds(Started, at=times, checkpoint=st.none() | names, report=naturals, requested=st.none() | texts),
    Reported: st.builds(
        Reported, at=times, report=naturals, step=naturals, epoch=st.none() | naturals, metrics=any_metrics
    ),
    Saved: st.builds(
        Saved, at=times, checkpoint=names, name=names, sequence=naturals, report=naturals, reasons=text_tuples
    ),
    SaveFailed: st.builds(SaveFailed, at=times, checkpoint=names, name=names, reasons=text_tuples, error=texts),
    Removed: st.builds(
        Removed,
        at=times,
        checkpoint=names,
        name=names,
        step=naturals,
        epoch=st.none() | naturals,
        reason=texts,
        by=texts,
        until=st.none() | times,
    ),
    PartsDropped: st.builds(
        PartsDropped,
        at=times,
        checkpoint=names,
        name=names,
        parts=text_tuples,
        reason=texts,
        by=texts,
        until=st.none() | times,
    ),
    Undone: st.builds(Undone, at=times, checkpoint=names, name=names, parts=text_tuples, by=texts),
    Archived: st.builds(Archived, at=times, checkpoint=names, name=names, packed_bytes=naturals, by=texts),
    Restored: st.builds(Restored, at=times, checkpoint=names, name=names, by=texts),
    Changing: st.builds(Changing, at=times, checkpoint=names, name=names, by=texts),
    Measured: st.builds(
        Measured,
        at=times,
        checkpoint=names,
        step=naturals,
        metrics=any_metrics,
        part=st.none() | texts,
        source=texts,
        by=texts,
    ),
    Withdrawn: st.builds(Withdrawn, at=times, checkpoint=names, metrics=text_tuples, by=texts),
    Pinned: st.builds(Pinned, at=times, checkpoint=names, why=texts, by=texts),
    Unpinned: st.builds(Unpinned, at=times, checkpoint=names, by=texts),
    Promoting: st.builds(
        Promoting, at=times, checkpoint=names, name=names, alias=texts, record=ordinals, token=texts, by=texts
    ),
    Promoted: st.builds(
        Promoted,
        at=times,
        checkpoint=names,
        name=names,
        alias=texts,
        record=st.none() | ordinals,
        digest=st.none() | texts,
        token=texts,
        by=texts,
    ),
    Closed: st.builds(Closed, at=times, why=texts),
}
any_event = st.one_of(*events_of.values())


def clock():
    return START


def reported(number, **metrics):
    return Reported(at=START, report=number, step=10 * number, epoch=None, metrics=metrics)


def saved(number, report):
    return Saved(at=START, checkpoint=f"c{number}", name=f"n{number}", sequence=number, report=report, reasons=("r",))


def started(checkpoint, report):
    return Started(at=START, checkpoint=checkpoint, report=report)


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return LocalStore(tmp_path) if request.param == "local" else MemoryStore()


def key(name="000001.jsonl"):
    return f"{journal_prefix('r')}/{name}"


def store_with(data, name="000001.jsonl"):
    store = MemoryStore()
    store.put(key(name), [data])
    return store


# --- records ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(events_of), ids=lambda kind: kind.__name__)
@settings(max_examples=40)
@given(st.data())
def test_every_kind_of_event_round_trips(kind, data):
    event = data.draw(events_of[kind])
    line = encode(event)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    found = decode(line, where="here")
    assert type(found) is kind
    assert repr(found) == repr(event)  # repr tells NaN and -0.0, == does not
    assert encode(found) == line


def test_all_kinds_are_tested():
    assert set(events_of) == set(KINDS.values())


def test_every_flipped_bit_of_a_line_is_noticed():
    line = encode(reported(3, m=0.5, bad=float("nan")))[:-1]
    for place, bit in itertools.product(range(len(line)), range(8)):
        damaged = bytearray(line)
        damaged[place] ^= 1 << bit
        with pytest.raises(CorruptError, match="here"):
            decode(bytes(damaged), where="here")


def test_every_truncation_of_a_line_is_noticed():
    line = encode(saved(1, 1))
    for length in range(1, len(line) - 1):
        with pytest.raises(CorruptError):
            decode(line[:length], where="here")


def test_a_kind_that_a_newer_release_has_added_is_nothing():
    assert decode(seal({"kind": "celebrated", "at": "soon"}), where="here") is None


def test_fields_that_a_newer_release_has_added_are_passed_over():
    line = seal({"kind": "closed", "at": "2026-03-01T12:00:00Z", "why": "closed", "mood": "good"})
    assert decode(line, where="here") == Closed(at=START, why="closed")


@pytest.mark.parametrize(
    "record",
    [
        {"a": 1},
        {"kind": None},
        {"kind": ["closed"]},
        {"kind": {}},
        {"kind": "closed"},
        {"kind": "closed", "at": "yesterday", "why": "x"},
        {"kind": "closed", "at": "2026-03-01T12:00:00Z", "why": 3},
        {"kind": "reported", "metrics": None},
        {"kind": "reported", "metrics": [1]},
        {"kind": "reported", "metrics": {"m": None}},
        {"kind": "reported", "metrics": {"m": "x"}},
        {"kind": "reported", "metrics": {"m": 10**400}},
        {"kind": "reported", "metrics": {}},
    ],
    ids=lambda record: repr(record)[:60],
)
def test_sealed_records_that_are_no_events_are_damage(record):
    with pytest.raises(CorruptError, match="here is not a journal record"):
        decode(seal(record), where="here")


# --- segments -----------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.lists(any_event, max_size=6))
def test_what_is_appended_is_read(events):
    store = MemoryStore()
    journal = Journal(store, "r", clock)
    for event in events:
        journal.append(event)
    journal.close()
    found = j.read(store, "r")
    assert repr(found.events) == repr(tuple(events))
    assert found.damage == ()
    assert list(found.segments) == ["000001.jsonl"]


_NO_METRICS = '"at":"2026-03-01T12:00:00Z","report":1,"step":2,"epoch":null,"metrics":'


@pytest.mark.parametrize(
    "members",
    [
        _NO_METRICS + '{"m":1,"n":-0.0,"o":1e308,"p":"nan","q":"-inf"}',
        _NO_METRICS + '{"m":0.5},"mood":"good"',
        _NO_METRICS + '{"m":0.5,"m":1.5}',
        _NO_METRICS + '{"m":"0.5"}',
        _NO_METRICS + '{"m":1e999}',
        _NO_METRICS + '{"m":1' + "0" * 400 + "}",
        _NO_METRICS + '{"m":true}',
        _NO_METRICS + '{"m":null}',
        _NO_METRICS + '{"m":NaN}',
        _NO_METRICS + '{"m":0.5},"mood":' + "[" * 5000 + "]" * 5000,
        _NO_METRICS + "[0.5]",
        _NO_METRICS + "{}," + '"report":2',
        _NO_METRICS + "{}," + '"report":"2"',
        _NO_METRICS + "{}," + '"step":1.5',
        '"at":5,"report":1,"step":2,"epoch":null,"metrics":{}',
        '"at":"2026-03-01T12:00:00","report":1,"step":2,"epoch":null,"metrics":{}',
        '"report":1,"step":2,"epoch":null,"metrics":{}',
    ],
    ids=lambda members: members[-40:],
)
def test_a_report_is_read_as_its_line_is_decoded(members):
    body = b'{"kind":"reported",' + members.encode()
    line = body + b',"seal":"' + digest(body)[:16].encode() + b'"}\n'
    try:
        expected, damage = [decode(line, where=f"{key()} line 1")], []
    except CorruptError as error:
        expected, damage = [], [str(error)]
    found = j.read(store_with(line), "r")
    assert (repr(list(found.events)), list(found.damage)) == (repr(expected), damage)


def test_every_flipped_bit_of_a_report_is_noticed_when_it_is_read():
    first, second, third = (encode(reported(number, m=0.5)) for number in range(1, 4))
    for place, bit in itertools.product(range(len(second) - 1), range(8)):
        damaged = bytearray(second)
        damaged[place] ^= 1 << bit
        found = j.read(store_with(first + damaged + third), "r")
        assert found.events == (reported(1, m=0.5), reported(3, m=0.5)), "the others are read all the same"
        assert found.damage
        assert all("line 2" in sentence or "line 3" in sentence for sentence in found.damage)


def test_events_are_told_by_segment():
    store = store_with(encode(reported(1)) + encode(reported(2)))
    store.put(key("000002.jsonl"), [b"damaged\n"])
    store.put(key("000003.jsonl"), [encode(saved(1, 2)) + encode(reported(3))[:-1]])
    assert list(j.read(store, "r").by_segment()) == [
        ("000001.jsonl", (reported(1), reported(2))),
        ("000002.jsonl", ()),
        ("000003.jsonl", (saved(1, 2),)),
    ]


def test_events_are_readable_before_they_are_synced(store):
    journal = Journal(store, "r", clock)
    for number in range(1, 4):
        journal.append(reported(number))
        assert len(j.read(store, "r").events) == number
    journal.close()


def test_no_journal_is_an_empty_one(store):
    assert j.read(store, "r") == j.JournalContents((), (), {})
    Journal(store, "r", clock).close()
    assert j.read(store, "r") == j.JournalContents((), (), {"000001.jsonl": 0})
    assert j.read(store, "other").segments == {}


def test_now_is_what_the_clock_says(store):
    times = iter([START, START - timedelta(hours=1)])
    journal = Journal(store, "r", lambda: next(times))
    assert [journal.now(), journal.now()] == [START, START - timedelta(hours=1)]
    journal.close()


def test_two_journals_at_once_write_segments_of_their_own(store):
    first, second = Journal(store, "r", clock), Journal(store, "r", clock)
    second.append(reported(3))
    first.append(reported(1))
    second.append(reported(4))
    first.append(reported(2))
    first.close()
    second.close()
    found = j.read(store, "r")
    assert found.segments == {"000001.jsonl": 2, "000002.jsonl": 2}
    assert [event.report for event in found.events] == [1, 2, 3, 4]


def test_journals_that_are_opened_by_racing_threads_get_different_segments(store):
    barrier = threading.Barrier(8)
    failures = []

    def work(number):
        try:
            barrier.wait()
            journal = Journal(store, "r", clock)
            journal.append(reported(number))
            journal.close()
        except Exception as error:  # noqa: BLE001 - told to the test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    found = j.read(store, "r")
    assert list(found.segments) == [f"{number:06d}.jsonl" for number in range(1, 9)]
    assert sorted(event.report for event in found.events) == list(range(8))


def test_segments_are_read_in_the_order_of_their_numbers_also_beyond_six_digits(store):
    for number in (2, 999_999, 10):
        store.create(key(f"{number:06d}.jsonl"), encode(reported(number)))
    journal = Journal(store, "r", clock)
    journal.append(reported(1_000_000))
    journal.close()
    found = j.read(store, "r")
    assert list(found.segments)[-1] == "1000000.jsonl"
    assert [event.report for event in found.events] == [2, 10, 999_999, 1_000_000]


@pytest.mark.parametrize("name", ["notes.txt", "x", "000007.jsonl.bak", "²²²²²².jsonl", "٣.jsonl", "a/b.jsonl"])
def test_foreign_files_do_not_keep_a_journal_from_being_opened(store, name):
    store.create(key(name), b"hello")
    journal = Journal(store, "r", clock)
    journal.append(reported(1))
    journal.close()
    assert reported(1) in j.read(store, "r").events


class ShortWrites(FileOps):
    """A system that writes three bytes at a time."""

    def write(self, fd, data):
        return os.write(fd, data[:3])


def test_threads_do_not_mix_their_lines(tmp_path):
    journal = Journal(LocalStore(tmp_path, ShortWrites()), "r", clock)

    def work(first):
        for number in range(first, first + 20):
            journal.append(reported(number, loss=0.5))

    threads = [threading.Thread(target=work, args=(100 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    found = j.read(LocalStore(tmp_path), "r")
    assert found.damage == ()
    numbers = [event.report for event in found.events]
    assert len(numbers) == 80
    for first in (0, 100, 200, 300):
        assert [n for n in numbers if first <= n < first + 100] == list(range(first, first + 20))


class FullDisk(FileOps):
    """A disk that takes ``room`` bytes and then is full, until ``room`` is raised."""

    room = 10**9

    def write(self, fd, data):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = os.write(fd, data[: self.room])
        self.room -= written
        return written


@pytest.mark.parametrize("room", [0, 1, 40, len(encode(reported(2))) - 1])
def test_an_append_that_fails_half_way_costs_no_other_line(tmp_path, room):
    ops = FullDisk()
    journal = Journal(LocalStore(tmp_path, ops), "r", clock)
    journal.append(reported(1))
    ops.room = room
    with pytest.raises(StoreError, match="free some space") as caught:
        journal.append(reported(2))
    assert caught.value.errno == errno.ENOSPC
    ops.room = 10**9
    journal.append(reported(3))
    journal.append(reported(4))
    journal.close()
    found = j.read(LocalStore(tmp_path), "r")
    assert [event.report for event in found.events] == [1, 3, 4]
    assert found.damage == ()


# --- damage -------------------------------------------------------------------------------------------------------

LINES = [encode(reported(1, m=0.25)), encode(saved(1, 1)), encode(Closed(at=START, why="closed")), encode(reported(2))]
WHOLE = b"".join(LINES)


def test_a_torn_last_line_is_skipped_at_every_length():
    ends = list(itertools.accumulate(map(len, LINES)))
    for length in range(len(WHOLE)):
        found = j.read(store_with(WHOLE[:length]), "r")
        whole = sum(end <= length for end in ends)
        assert found.damage == ()
        assert [encode(event) for event in found.events] == LINES[:whole]


def test_a_torn_segment_does_not_hide_the_next():
    store = store_with(WHOLE[:-5])
    store.put(key("000002.jsonl"), [encode(reported(9))])
    found = j.read(store, "r")
    assert found.damage == ()
    assert [encode(event) for event in found.events] == [*LINES[:3], encode(reported(9))]


def test_every_flipped_bit_in_the_middle_is_named_and_the_other_lines_are_read():
    begin, end = len(LINES[0]), len(LINES[0]) + len(LINES[1]) - 1  # the second line without its newline
    for place, bit in itertools.product(range(begin, end), range(8)):
        damaged = bytearray(WHOLE)
        damaged[place] ^= 1 << bit
        found = j.read(store_with(bytes(damaged)), "r")
        assert [encode(event) for event in found.events] == [LINES[0], *LINES[2:]]
        assert found.damage
        assert "000001.jsonl line 2" in found.damage[0]


def test_a_damaged_newline_costs_the_two_lines_that_it_parted():
    for bit in range(8):
        damaged = bytearray(WHOLE)
        damaged[len(LINES[0]) - 1] ^= 1 << bit
        found = j.read(store_with(bytes(damaged)), "r")
        assert [encode(event) for event in found.events] == LINES[2:]
        assert len(found.damage) == 1


@settings(max_examples=150)
@given(st.integers(0, len(WHOLE)), st.integers(0, 300), st.binary(max_size=40))
@example(0, len(WHOLE), b"\n\n\n")
def test_overwritten_stretches_never_invent_an_event(begin, length, junk):
    found = j.read(store_with(WHOLE[:begin] + junk + WHOLE[begin + length :]), "r")
    events = [encode(event) for event in found.events]
    left = iter(LINES)
    assert all(event in left for event in events)  # a subsequence


def test_unknown_kinds_are_skipped_and_are_no_damage():
    strange = seal({"kind": "celebrated", "at": "soon"})
    found = j.read(store_with(LINES[0] + strange + LINES[1]), "r")
    assert [encode(event) for event in found.events] == LINES[:2]
    assert found.damage == ()


# --- the history --------------------------------------------------------------------------------------------------


@st.composite
def runs(draw):
    """A journal, the present history, and that of each checkpoint, as a process that copies everything sees them."""
    events, current, at = [], [], {}
    for number in range(draw(st.integers(0, 25))):
        choice = draw(st.sampled_from("rrrrssxnoc"))
        if choice == "r":
            events.append(reported(current[-1].report + 1 if current else 1, value=float(number)))
            current = [*current, events[-1]]
        elif choice == "s":
            # a save is recorded later than its report: others may have come in between
            report = draw(st.integers(0, current[-1].report if current else 0))
            events.append(saved(number, report))
            at[f"c{number}"] = [event for event in current if event.report <= report]
        elif choice == "x" and at:
            name = draw(st.sampled_from(sorted(at)))
            current = list(at[name])
            events.append(started(name, current[-1].report if current else 0))
        elif choice == "n":
            current = []
            events.append(started(None, 0))
        elif choice == "o":  # from a checkpoint that the journal has no record of: of another run, or killed before it
            last = draw(st.integers(0, current[-1].report if current else 0))
            current = [event for event in current if event.report <= last]
            events.append(started("elsewhere", last))
        else:
            events.append(Closed(at=START, why="closed"))
    return events, current, at


@settings(max_examples=250)
@given(runs())
def test_the_history_is_that_of_the_branch(run):
    events, current, at = run
    assert history(events) == current
    for checkpoint, expected in at.items():
        assert history(events, checkpoint) == expected
    assert history(events, "elsewhere") == []
    assert history(iter(events)) == current


@given(runs())
def test_the_history_can_be_asked_twice_and_changes_no_event(run):
    events, current, _ = run
    before = repr(events)
    history(events).append(reported(99))
    assert history(events) == current
    assert repr(events) == before


def test_a_branch_from_an_older_checkpoint_leaves_out_what_was_abandoned():
    events = [started(None, 0), reported(1), saved(1, 1), reported(2), saved(2, 2), reported(3)]
    events += [started("c1", 1), reported(2, again=1.0), saved(3, 2), started("c2", 2), reported(3, third=1.0)]
    assert history(events) == [events[1], events[3], events[10]]
    assert history(events, "c3") == [events[1], events[7]]
    assert history(events, "c2") == [events[1], events[3]]


def test_newest_is_the_last_of_its_kind():
    events = [saved(1, 1), reported(1), saved(2, 2), reported(2)]
    assert newest_event(events, Saved) == saved(2, 2)
    assert newest_event(events, Closed) is None
    assert newest_event([], Saved) is None


def test_events_are_values():
    event = reported(1, m=0.5)
    assert structs.replace(event, report=2) != event
    assert {field.name for field in structs.fields(event)} == {"at", "report", "step", "epoch", "metrics"}
    with pytest.raises(AttributeError):
        event.report = 3
