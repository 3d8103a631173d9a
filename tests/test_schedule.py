"""The schedule against a model of what a device would do, with groups of any size and layers in any order."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distorch2.planning.schedule import LearntOrder, Schedule

pytestmark = pytest.mark.quick


class Device:
    """Runs layers as the streamer does, and checks that each finds its own group's weights."""

    def __init__(self, group_of, sizes, capacity, order=None):
        self.schedule = Schedule(group_of, sizes, capacity, order)
        self.group_of, self.sizes, self.capacity = group_of, sizes, capacity
        self.memory = [None] * capacity
        self.version = self.schedule.version
        self.fetched = []
        self.num_late = 0

    def fetch(self, groups):
        for group in groups:
            begin = self.schedule.offsets[group]
            assert 0 <= begin <= self.capacity - self.sizes[group]
            self.memory[begin : begin + self.sizes[group]] = [group] * self.sizes[group]
        self.fetched += groups

    def run(self, layer):
        groups = self.schedule.enter(layer)
        if self.schedule.version != self.version:
            self.version = self.schedule.version
            self.memory = [None] * self.capacity
        group = self.group_of[layer]
        self.num_late += group in groups
        self.fetch(groups)
        begin = self.schedule.offsets[group]
        assert self.memory[begin : begin + self.sizes[group]] == [group] * self.sizes[group]
        self.fetch(self.schedule.leave(layer))


def fetched_in_one_pass(device, order):
    before = len(device.fetched)
    for layer in order:
        device.run(layer)
    return device.fetched[before:]


def late_in_one_pass(device, order):
    before = device.num_late
    fetched_in_one_pass(device, order)
    return device.num_late - before


@st.composite
def models(draw):
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    group_of = [group for group in range(len(sizes)) for _ in range(draw(st.integers(1, 4)))]
    capacity = draw(st.integers(max(sizes), sum(sizes) + 3))
    return group_of, sizes, capacity


@settings(max_examples=300, deadline=None)
@given(models(), st.data())
def test_every_layer_finds_its_weights_whatever_the_order(model, data):
    device = Device(*model)
    layers = st.integers(0, len(model[0]) - 1)
    for layer in data.draw(st.lists(layers, max_size=80)):
        device.run(layer)
        if data.draw(st.integers(0, 20)) == 0:
            device.schedule.forget_staged()


@settings(max_examples=200, deadline=None)
@given(models(), st.randoms(use_true_random=False))
def test_an_order_of_whole_groups_is_learnt_in_one_pass(model, random):
    """From then on each group is fetched once in a pass, and all but the first of them ahead of its use."""
    group_of, sizes, capacity = model
    groups = list(range(len(sizes)))
    random.shuffle(groups)
    order = [layer for group in groups for layer in range(len(group_of)) if group_of[layer] == group]
    device = Device(group_of, sizes, capacity)
    fetched_in_one_pass(device, order)
    fetched_in_one_pass(device, order)
    for _ in range(3):
        assert sorted(fetched_in_one_pass(device, order)) == sorted(groups)


@st.composite
def models_with_passes(draw):
    """(model, the layers of a full pass, kinds of passes that leave layers out): a block of it may run twice."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=3, max_size=10))
    group_of = [group for group in range(len(sizes)) for _ in range(draw(st.integers(1, 3)))]
    least = sum(sorted(sizes)[-3:])  # as planned
    capacity = draw(st.integers(least, max(least, sum(sizes) + 3)))
    full = list(range(len(group_of)))
    if draw(st.booleans()):
        begin = draw(st.integers(1, len(full) - 1))
        end = draw(st.integers(begin, len(full) - 1)) + 1
        full = full[:end] + full[begin:end] + full[end:]
    left_out = st.sets(st.integers(1, len(full) - 1))
    kinds = [
        [layer for position, layer in enumerate(full) if position not in draw(left_out)]
        for _ in range(draw(st.integers(1, 3)))
    ]
    return (group_of, sizes, capacity), full, kinds


@settings(max_examples=400, deadline=None)
@given(models_with_passes(), st.data())
def test_a_full_pass_has_one_late_group_at_most_after_any_mixture_of_passes(model, data):
    model, full, kinds = model
    device = Device(*model)
    for _ in range(2):
        fetched_in_one_pass(device, full)
    version, is_plain = device.schedule.version, len(full) == len(set(full))
    most = 1 if is_plain else 3  # where a block runs twice, and a part of it had been left out
    for number in data.draw(st.lists(st.integers(-1, len(kinds) - 1), max_size=25)):
        if number >= 0:
            fetched_in_one_pass(device, kinds[number])
        else:
            assert late_in_one_pass(device, full) <= most
    assert late_in_one_pass(device, full) <= most
    if is_plain:
        assert device.schedule.version == version  # the ring is as it was, and nobody waits for the device


@pytest.mark.parametrize("num_skipping", [1, 2, 5, 20])
def test_step_caches(num_skipping):
    """40 groups, of which most passes run the two at either end only."""
    device = Device(group_of=list(range(40)), sizes=[1] * 40, capacity=8)
    ends = [0, 1, 38, 39]
    for _ in range(2):
        fetched_in_one_pass(device, range(40))
    for _ in range(4):
        late = [late_in_one_pass(device, ends) for _ in range(num_skipping)]
        assert late[:2] == [1] * len(late[:2])  # the first after the gap
        assert not any(late[2:])
        assert late_in_one_pass(device, range(40)) == (num_skipping > 1)
        assert late_in_one_pass(device, range(40)) == 0


def test_what_is_left_out_for_long_is_not_fetched_either():
    device = Device(group_of=list(range(10)), sizes=[1] * 10, capacity=4)
    for order in (range(10), range(10), [0, 1, 9], [0, 1, 9]):
        fetched_in_one_pass(device, order)
    for _ in range(3):
        assert sorted(fetched_in_one_pass(device, [0, 1, 9])) == [0, 1, 9]


@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_block_that_runs_twice_is_part_of_the_order(num_layers):
    group_of = [group for group in range(8) for _ in range(num_layers)]
    device = Device(group_of, sizes=[1] * 8, capacity=4)
    block = list(range(3 * num_layers, 5 * num_layers))
    order = [*range(3 * num_layers), *block, *block, *range(5 * num_layers, 8 * num_layers)]
    for _ in range(3):
        fetched_in_one_pass(device, order)
    assert [late_in_one_pass(device, order) for _ in range(3)] == [0, 0, 0]
    assert list(device.schedule.order) == order


def test_what_a_pass_has_in_addition_is_expected_at_its_place():
    device = Device(group_of=list(range(8)), sizes=[1] * 8, capacity=4)
    some, others = [0, 1, 2, 6, 7], [0, 3, 4, 5, 7]
    for order in (some, others, some, others):
        fetched_in_one_pass(device, order)
    for _ in range(5):
        # They take turns: what the other leaves out is skipped once.
        assert late_in_one_pass(device, some) <= 1
        assert late_in_one_pass(device, others) <= 1


def test_another_sequence_for_good():
    device = Device(group_of=list(range(8)), sizes=[1] * 8, capacity=4)
    fetched_in_one_pass(device, range(8))
    order, version = [0, 5, 3, 1, 4, 2, 6, 7], device.schedule.version
    for _ in range(13):
        fetched_in_one_pass(device, order)
    assert device.schedule.version > version  # laid out for it, since it comes again and again
    for _ in range(3):
        assert late_in_one_pass(device, order) == 0
        assert sorted(fetched_in_one_pass(device, order)) == sorted(order)


def test_a_layer_that_runs_once_and_never_again_does_not_begin_a_pass():
    device = Device(group_of=list(range(6)), sizes=[1] * 6, capacity=3)
    device.run(0)
    for _ in range(6):
        fetched_in_one_pass(device, range(1, 6))
    assert [late_in_one_pass(device, range(1, 6)) for _ in range(3)] == [0, 0, 0]


def test_a_known_order_is_fetched_ahead_from_the_first_pass_on():
    model = {"group_of": [0, 0, 1, 2, 3, 4], "sizes": [1] * 5, "capacity": 3}
    order = [0, 1, 5, 3, 4, 2]
    device = Device(**model)
    assert device.schedule.order is None
    fetched_in_one_pass(device, order)
    assert list(device.schedule.order) == order  # which is all that is known of it
    fetched_in_one_pass(device, order)
    again = Device(**model, order=device.schedule.order)
    assert late_in_one_pass(again, order) == 1
    assert late_in_one_pass(again, order) == 0


def test_a_learnt_order_serves_other_layers_as_well():
    learnt = LearntOrder()
    registered = ["a", "b", "c", "d", "e"]
    assert learnt.of(["a", "b"], registered) is None
    learnt.note(["a", "d", "b", "a"])
    assert learnt.of(["a", "b", "d"], registered) == [0, 2, 1, 0]
    # c is registered after b, and e after d.
    assert learnt.of(registered, registered) == [0, 3, 4, 1, 2, 0]
    learnt.note(["d", "b"])  # of a part of them it is no news
    assert learnt.of(["b", "d"], registered) == [1, 0]
    assert learnt.of(["a", "b", "d"], registered) == [0, 2, 1, 0]
    learnt.note(["b", "d"])
    assert learnt.of(["b", "d"], registered) == [0, 1]


def test_groups_are_fetched_as_far_ahead_as_there_is_room():
    device = Device(group_of=[0, 1, 2, 3, 4, 5], sizes=[1] * 6, capacity=3)
    order = range(6)
    fetched_in_one_pass(device, order)
    device.run(0)  # the order is known from here on: its own, and the two that fit beside it
    assert device.fetched[6:] == [0, 1, 2, 3]
    assert fetched_in_one_pass(device, range(1, 6)) == [4, 5, 0, 1, 2]


def test_layers_of_two_groups_that_take_turns_are_not_fetched_twice():
    device = Device(group_of=[0, 0, 1, 1, 2, 2], sizes=[4, 4, 4], capacity=8)
    order = [0, 2, 1, 3, 4, 5]
    fetched_in_one_pass(device, order)
    fetched_in_one_pass(device, order)
    assert sorted(fetched_in_one_pass(device, order)) == [0, 1, 2]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_neighbours_that_take_turns_are_fetched_once(data):
    """As norms, which are registered after what they run before."""
    num_groups = data.draw(st.integers(4, 12))
    sizes = data.draw(st.lists(st.integers(3, 9), min_size=num_groups, max_size=num_groups))
    device = Device([group for group in range(num_groups) for _ in range(3)], sizes, capacity=4 * max(sizes))
    order = list(range(3 * num_groups))
    for group in range(num_groups - 1):
        if data.draw(st.booleans()):  # the last layer of a group runs after the first of the next
            order[3 * group + 2], order[3 * group + 3] = order[3 * group + 3], order[3 * group + 2]
    for _ in range(3):
        fetched_in_one_pass(device, order)
    for _ in range(3):
        fetched = fetched_in_one_pass(device, order)
        assert len(fetched) == len(set(fetched))  # where all fit, some stay for the next pass


def test_a_layer_that_is_skipped_or_out_of_order_does_not_stop_the_others():
    device = Device(group_of=list(range(8)), sizes=[1] * 8, capacity=4)
    for _ in range(2):
        fetched_in_one_pass(device, range(8))
    for order in ([0, 1, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0], range(8)):
        for _ in range(5):
            fetched = fetched_in_one_pass(device, order)
        assert sorted(fetched) == sorted(order)


def test_a_group_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a group of 9 bytes does not fit 8 bytes"):
        Schedule([0], [9], 8)
