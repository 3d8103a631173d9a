"""The schedule against a model of what a device would do, with groups of any size and layers in any order."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distorch2.schedule import Schedule

pytestmark = pytest.mark.quick


class Device:
    """Runs layers as the streamer does, and checks that each finds its own group's weights."""

    def __init__(self, group_of, sizes, capacity):
        self.schedule = Schedule(group_of, sizes, capacity)
        self.group_of, self.sizes, self.capacity = group_of, sizes, capacity
        self.memory = [None] * capacity
        self.version = self.schedule.version
        self.fetched = []

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
        self.fetch(groups)
        group = self.group_of[layer]
        begin = self.schedule.offsets[group]
        assert self.memory[begin : begin + self.sizes[group]] == [group] * self.sizes[group]
        self.fetch(self.schedule.leave(layer))


def fetched_in_one_pass(device, order):
    before = len(device.fetched)
    for layer in order:
        device.run(layer)
    return device.fetched[before:]


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


def test_a_layer_that_is_skipped_or_out_of_order_does_not_stop_the_others():
    device = Device(group_of=list(range(8)), sizes=[1] * 8, capacity=4)
    for _ in range(2):
        fetched_in_one_pass(device, range(8))
    for order in ([0, 1, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0], range(8)):
        for _ in range(3):
            fetched = fetched_in_one_pass(device, order)
        assert sorted(fetched) == sorted(order)


def test_a_group_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a group of 9 bytes does not fit 8 bytes"):
        Schedule([0], [9], 8)
