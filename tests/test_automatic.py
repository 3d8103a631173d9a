"""`auto`: which shares are chosen, from numbers alone, and what is learnt from a run on simulated accelerators."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocation_parser import parse_allocation
from distorch2.planning.automatic import UNKNOWN, Speeds, choose
from distorch2.planning.plan import GIB, ComponentRequest, DeviceMemory, Layer
from distorch2.planning.planner import make_plan

pytestmark = pytest.mark.quick
HOME, PEER, THIRD = "cuda:0", "cuda:1", "cuda:2"
MIB = 1024**2
LINK = {"cpu": 1.0}


def chosen(model_bytes, free, speeds=UNKNOWN, text="auto", donor_mode="auto", older=()):
    memory = {device: DeviceMemory(100 * GIB, num_bytes, device not in older) for device, num_bytes in free.items()}
    request = ComponentRequest(HOME, parse_allocation(text, (*memory, "cpu")), donor_mode)
    return dict(choose(model_bytes, request, memory | {"cpu": DeviceMemory(100 * GIB)}, speeds).num_bytes)


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        (UNKNOWN, {HOME: 10, PEER: 10}),
        (Speeds(LINK, {}, 1.0), {HOME: 10, PEER: 10}),  # no slower, as far as is known
        (Speeds(LINK, {HOME: 100.0, PEER: 95.0}, 1.0), {HOME: 10, PEER: 10}),
        # A step of ten seconds hides all copies, which a card that is half as fast would make longer.
        (Speeds(LINK, {HOME: 100.0, PEER: 50.0}, 10.0), {HOME: 10, "cpu": 10}),
        # One of a second hides next to nothing: rather half as fast.
        (Speeds(LINK, {HOME: 100.0, PEER: 50.0}, 1.0), {HOME: 10, PEER: 10, "cpu": 0}),
        # A byte is computed in 0.4 s, on the other card in 0.8, and copied in 1: as many are copied as are hidden.
        (Speeds(LINK, {HOME: 100.0, PEER: 50.0}, 8.0), {HOME: 10, PEER: 3, "cpu": 7}),
        (Speeds(LINK, {HOME: 50.0, PEER: 100.0}, 10.0), {HOME: 10, PEER: 10}),
    ],
)
def test_a_slower_card_is_used_for_as_much_as_makes_a_step_shorter(speeds, expected):
    found = chosen(2000, {HOME: 1000, PEER: 1000}, _of_hundreds(speeds))
    assert {device: round(num_bytes / 100) for device, num_bytes in found.items() if num_bytes} == expected


def _of_hundreds(speeds):
    links = {device: 100 * link for device, link in speeds.link_bytes_per_s.items()}
    return Speeds(links, speeds.multiplications_per_s, speeds.step_s)


def test_what_is_not_timed_is_taken_for_a_large_image():
    model_bytes, free = 20 * GIB, {HOME: 10 * GIB, PEER: 10 * GIB}
    fast_link = Speeds({"cpu": 50e9}, {HOME: 1e14, PEER: 2e13})
    assert PEER not in chosen(model_bytes, free, fast_link)  # 0.44 s, in which 20 GiB are copied
    assert chosen(model_bytes, free, Speeds({"cpu": 1e9}, fast_link.multiplications_per_s))[PEER] > 5 * GIB


def test_what_is_kept_free_and_what_only_keeps():
    free = {HOME: 1000, PEER: 1000, "xpu:0": 5000}
    assert chosen(3000, free, text="auto;keep=200b") == {HOME: 800, PEER: 800, "cpu": 1400}
    slow = Speeds({"cpu": 1e9}, {HOME: 1.0, PEER: 0.01}, 1.0)
    assert chosen(3000, free, slow) == {HOME: 1000, "cpu": 2000}
    assert chosen(3000, free, slow, donor_mode="stream") == {HOME: 1000, PEER: 1000, "cpu": 1000}
    # A card of an older generation keeps what those that can compute have no room for.
    assert chosen(3000, free, older={PEER}) == {HOME: 1000, PEER: 1000, "cpu": 1000}
    free[THIRD] = 1500
    assert chosen(3000, free, older={THIRD}) == {HOME: 1000, PEER: 1000, THIRD: 1000}


@pytest.mark.parametrize(("donor_mode", "older"), [("stream", ()), ("auto", (PEER, THIRD))])
def test_of_cards_that_only_keep_weights_the_one_with_the_fastest_link_is_first(donor_mode, older):
    free = {HOME: 1000, PEER: 1500, THIRD: 1000}

    def kept(peer, third):
        speeds = Speeds({"cpu": 25e9, PEER: peer, THIRD: third})
        found = chosen(3000, free, speeds, donor_mode=donor_mode, older=older)
        return {device: num_bytes for device, num_bytes in found.items() if num_bytes and device != HOME}

    assert kept(peer=50e9, third=51e9) == {PEER: 1500, THIRD: 500}  # as fast, but for noise
    assert kept(peer=50e9, third=100e9) == {PEER: 1000, THIRD: 1000}
    assert kept(peer=24e9, third=25e9) == {PEER: 1500, THIRD: 500}  # both as main memory
    assert kept(peer=12e9, third=25e9) == {THIRD: 1000, "cpu": 1000}
    assert kept(peer=12e9, third=6e9) == {"cpu": 2000}


def test_of_cards_that_compute_as_fast_the_one_with_the_fastest_link_is_first():
    free, products = {HOME: 1000, PEER: 1500, THIRD: 1000}, {HOME: 1.0, PEER: 1.0, THIRD: 1.0}
    by_link = Speeds({"cpu": 25e9, PEER: 3e9, THIRD: 25e9}, products)
    assert chosen(2200, free, by_link) == {HOME: 1000, THIRD: 1000, PEER: 200}
    assert chosen(2200, free) == {HOME: 1000, PEER: 1200}
    by_both = Speeds(by_link.link_bytes_per_s, {**products, THIRD: 0.5}, 1.0)
    assert chosen(2200, free, by_both) == {HOME: 1000, PEER: 1200}
    assert chosen(2200, free, Speeds({PEER: 3e9})) == {HOME: 1000, PEER: 1200}  # what is not known comes last
    without_main_memory = Speeds({PEER: 3e9, THIRD: 25e9})
    assert chosen(2200, free, without_main_memory) == {HOME: 1000, THIRD: 1000, PEER: 200}


@given(
    st.integers(1, 10**10),
    st.lists(st.integers(0, 10**10), min_size=3, max_size=3),
    st.floats(0.001, 100),
    st.floats(1e3, 1e11),
)
def test_cards_that_are_as_fast_are_filled_whatever_a_step_takes(model_bytes, free, step_s, link):
    room = dict(zip([HOME, PEER, THIRD], free))
    products = {HOME: 1.0, PEER: 0.95, THIRD: 1.05}
    assert chosen(model_bytes, room, Speeds({"cpu": link}, products, step_s)) == chosen(model_bytes, room)


@given(
    st.integers(1, 10_000),
    st.lists(st.integers(0, 5_000), min_size=3, max_size=3),
    st.lists(st.floats(1.2, 5.0) | st.just(1.0), min_size=2, max_size=2),
    st.floats(0.01, 100),
    st.floats(1.0, 10_000),
)
def test_no_other_split_beside_a_full_compute_device_is_forecast_to_be_faster(
    model_bytes, free, slowness, step_s, link
):
    devices = [HOME, PEER, THIRD]
    speeds = Speeds({"cpu": link}, {HOME: 1.0, PEER: 1 / slowness[0], THIRD: 1 / slowness[1]}, step_s)
    found = chosen(model_bytes, dict(zip(devices, free)), speeds)
    kept = min(model_bytes, free[0])
    assert found[HOME] == kept
    assert sum(found.values()) == model_bytes
    assert all(num_bytes <= free[devices.index(device)] for device, num_bytes in found.items() if device != "cpu")

    def seconds(on_peer, on_third):
        at_home = step_s * (model_bytes - on_peer - on_third) / model_bytes
        elsewhere = step_s * (on_peer * slowness[0] + on_third * slowness[1]) / model_bytes
        return elsewhere + max(at_home, (model_bytes - kept - on_peer - on_third) / link)

    others = [
        seconds(int(free[1] * one), int(free[2] * other))
        for one, other in itertools.product([0, 0.25, 0.5, 0.75, 1], repeat=2)
        if int(free[1] * one) + int(free[2] * other) <= model_bytes - kept
    ]
    ours = seconds(found.get(PEER, 0), found.get(THIRD, 0))
    # A choice is one of 64, and a card that is up to a tenth slower may come first.
    assert ours <= min(others) + step_s * (4 / 64 + 0.1 * max(slowness)) + 2 / link


PACKABLE = [Layer(f"blocks.{number}.linear", 10 * MIB, True, 10 * MIB, "", "", False, True) for number in range(100)]


@pytest.mark.parametrize(("keep_mib", "at_home_mib"), [(0, 500 / 0.76), (100, 400 / 0.76)])
def test_what_has_no_room_when_it_is_packed_lies_on_other_cards(keep_mib, at_home_mib):
    """The planner takes bf16 weights to be packed to 76%."""
    memory = {HOME: DeviceMemory(GIB, 500 * MIB), PEER: DeviceMemory(GIB, 900 * MIB), "cpu": DeviceMemory(GIB)}
    allocation = parse_allocation(f"auto;keep={keep_mib * MIB}b", tuple(memory))
    plan = make_plan(PACKABLE, ComponentRequest(HOME, allocation, pack_weights="on"), memory)
    assert plan.bytes_on(HOME) / MIB == pytest.approx(at_home_mib, abs=10)
    assert plan.bytes_on(PEER) == 1000 * MIB - plan.bytes_on(HOME)


def test_without_another_card_it_lies_on_the_cpu():
    memory = {HOME: DeviceMemory(GIB, 500 * MIB), "cpu": DeviceMemory(GIB)}
    allocation = parse_allocation("auto", tuple(memory))
    plan = make_plan(PACKABLE, ComponentRequest(HOME, allocation, pack_weights="on"), memory)
    assert plan.bytes_on("cpu") > 0
    assert plan.within(500 * MIB).compute_bytes <= 500 * MIB


def test_what_cannot_be_packed_is_left_to_other_cards():
    """Of 1000 MiB, 100 are bf16, which leave room for 24 more."""
    layers = [replace(layer, is_bf16=number < 10) for number, layer in enumerate(PACKABLE)]
    memory = {HOME: DeviceMemory(GIB, 500 * MIB), PEER: DeviceMemory(GIB, 900 * MIB), "cpu": DeviceMemory(GIB)}
    plan = make_plan(layers, ComponentRequest(HOME, parse_allocation("auto", tuple(memory)), pack_weights="on"), memory)
    assert plan.bytes_on(HOME) / MIB == pytest.approx(524, abs=10)
    assert plan.bytes_on(PEER) == 1000 * MIB - plan.bytes_on(HOME)
