"""What stands still is found by evidence; how often a file is laid out anew is bounded, whatever the tensors do."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peakpoint.state.unchanged import WORTH_A_FILE, PartTensors, UnchangedTensors

KB = 1024


class Part:
    """Tensors with contents and version counters; ``save`` does what a save does with them, and counts writes."""

    def __init__(self, sizes, *, frozen=(), stepped=(), place=True):
        self.tensors = PartTensors(
            tuple(sizes), {n: size for n, size in sizes.items() if size}, *map(frozenset, (frozen, stepped))
        )
        self.placement = object() if place else None
        self.content = dict.fromkeys(sizes, 0)
        self.version = dict.fromkeys(sizes, 0)
        self.unchanged = UnchangedTensors()
        self.files = {}  # of the last commit: names to contents
        self.writes = dict.fromkeys(sizes, 0)
        self.compared_in_vain = 0

    def change(self, *names, counted=True):
        for name in names:
            self.content[name] += bool(self.tensors.sizes.get(name))
            self.version[name] += counted

    def overwrite(self, *names):
        for name in names:
            self.version[name] += 1

    def save(self, *, fails=False):
        self.unchanged.decide(self.tensors, self.placement, list(self.version.values()))
        separate = self.unchanged.separate
        files = {}
        for names, stable in [(separate, True), (self.content.keys() - separate, self.unchanged.rest_unchanged)]:
            held = tuple((name, self.content[name]) for name in self.content if name in names)
            shared = stable and self.files.get(frozenset(names)) == held
            self.compared_in_vain += stable and bool(self.files) and not shared
            if not shared and not fails:
                for name in names:
                    self.writes[name] += 1
            files[frozenset(names)] = held
        if not fails:
            self.files = files
            self.unchanged.learn({name: str(content) for name, content in self.content.items()})
        return sorted(separate)


def test_what_is_never_touched_is_written_twice():
    part = Part({"table": 500 * KB, "weight": 500 * KB, "empty": 0}, stepped=["weight"])
    layouts = []
    for _ in range(6):
        part.change("weight")
        layouts.append(part.save())
    assert layouts == [[], *[["table"]] * 5]
    assert part.writes == {"table": 2, "weight": 6, "empty": 6}


@pytest.mark.parametrize("how", ["overwritten", "stepped", "moved"])
def test_where_counters_say_nothing_digests_do_and_it_is_written_three_times(how):
    stepped = ["weight", "idle"] if how == "stepped" else ["weight"]
    part = Part({"idle": 500 * KB, "weight": 500 * KB}, stepped=stepped, place=how != "moved")
    for _ in range(6):
        part.change("weight")
        if how == "overwritten":
            part.overwrite("idle")
        part.save()
    assert part.writes == {"idle": 3, "weight": 6}
    assert part.compared_in_vain == 1, "the first time after the layout has changed"


def test_frozen_parameters_are_written_once_even_if_they_are_written_over_with_what_they_were():
    part = Part({"frozen": 500 * KB, "weight": 500 * KB}, frozen=["frozen"], stepped=["weight"])
    for _ in range(6):
        part.change("weight")
        part.overwrite("frozen")
        assert part.save() == ["frozen"]
    assert part.writes == {"frozen": 1, "weight": 6}


def test_parameters_called_frozen_that_change_are_compared_once_and_never_again():
    part = Part({"mean": 500 * KB, "other": 500 * KB}, frozen=["mean", "other"])
    for _ in range(8):
        part.change("mean", "other")
        part.save()
    assert part.writes == {"mean": 8, "other": 8}
    assert part.compared_in_vain == 1


def test_optimizers_that_counters_do_not_see_change_no_layout():
    part = Part({"weight": 500 * KB, "bias": 500 * KB}, stepped=["weight", "bias"])
    for _ in range(8):
        part.change("weight", "bias", counted=False)
        assert part.save() == []
    assert part.compared_in_vain == 0


def test_a_part_that_stands_still_as_a_whole_is_written_once_in_its_plain_file():
    part = Part({"a": 10, "b": 500 * KB})
    assert [part.save() for _ in range(4)] == [[]] * 4
    assert part.writes == {"a": 1, "b": 1}
    part.change("a")
    assert part.save() == ["b"]
    assert part.unchanged.rest_unchanged is False


def test_little_is_not_worth_a_file():
    part = Part({"a": WORTH_A_FILE - 1, "b": 500 * KB})
    for _ in range(4):
        part.change("b")
        assert part.save() == []


def test_who_joins_a_large_file_waits_until_it_is_worth_it():
    part = Part({"backbone": 400 * KB, "table": 100 * KB, "w": 1}, frozen=["backbone"], stepped=["w"])
    layouts = []
    for _ in range(8):
        part.change("w")
        layouts.append(part.save())
    assert layouts == [["backbone"]] * 4 + [["backbone", "table"]] * 4
    assert part.writes == {"backbone": 2, "table": 5, "w": 8}


def test_who_leaves_comes_back_after_twice_the_time():
    part = Part({"a": 500 * KB, "b": 500 * KB, "w": 1}, stepped=["w"])
    layouts = []
    for number in range(14):
        part.change("w")
        if number in (3, 8):
            part.change("a")
        layouts.append("".join(part.save()))
    assert layouts == ["", "ab", "ab", "b", "b", "ab", "ab", "ab", "b", "b", "b", "b", "ab", "ab"]


def test_a_save_that_failed_taught_nothing():
    part = Part({"a": 500 * KB, "w": 1}, stepped=["w"])
    part.save()
    part.change("a", "w")
    part.save(fails=True)
    part.change("w")
    assert part.save() == [], "it is compared with what was committed, not with what failed"
    part.change("w")
    assert part.save() == ["a"]


def test_what_stood_still_before_a_restart_goes_on_so():
    part = Part({"a": 500 * KB, "b": 500 * KB, "w": 1}, stepped=["w", "b"])
    for _ in range(5):
        part.change("w")
        part.save()
    assert part.unchanged.separate == {"a", "b"}
    writes = dict(part.writes)
    part.unchanged = UnchangedTensors()
    part.unchanged.inherit({name: str(content) for name, content in part.content.items()}, {"a", "b"}, {"a", "b"})
    for _ in range(3):
        part.change("w")
        assert part.save() == ["a", "b"]
    assert part.writes == {**writes, "w": writes["w"] + 3}


NAMES = "abcdef"
actions = st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(["change", "silent", "overwrite"])), max_size=4)


@given(
    st.lists(actions, max_size=60),
    st.lists(st.sampled_from([0, 10, 40 * KB, 100 * KB, 900 * KB]), min_size=6, max_size=6),
    st.sets(st.sampled_from("ab")),
    st.booleans(),
)
def test_whatever_happens_tensors_leave_seldom(schedule, sizes, frozen, place):
    frozen = {name for name in frozen if sizes[NAMES.index(name)]}
    part = Part(dict(zip(NAMES, sizes, strict=True)), frozen=frozen, stepped="cd", place=place)
    before, left = set(), 0
    for taken in [*schedule, *[[("f", "change")]] * 200]:
        for name, how in taken:
            match how:
                case "change":
                    part.change(name)
                case "silent":
                    part.change(name, counted=False)
                case "overwrite":
                    part.overwrite(name)
        separate = set(part.save())
        left += bool(before - separate - frozen)
        before = separate
    assert left <= 1 + math.log2(len(schedule) + 200) + len(frozen)
    # in the end everything that is worth it is shared, and nothing is compared in vain
    in_vain, writes = part.compared_in_vain, dict(part.writes)
    part.change("f")
    part.save()
    known = part.tensors.sizes
    still = sum(size for name, size in known.items() if name != "f")
    written = sum(size for name, size in known.items() if name != "f" and part.writes[name] != writes[name])
    assert written <= 50 or still < WORTH_A_FILE
    assert part.compared_in_vain == in_vain
