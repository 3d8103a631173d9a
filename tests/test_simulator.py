import pytest
from simulator import LayerTime, UnitCall, forecast, forecast_pair, forecast_relay

pytestmark = pytest.mark.quick

# Three groups fit at one time, so that the ring comes round at the end of the pass.
NINE = {"group_of": range(9), "sizes": [100] * 9, "capacity": 300, "bytes_per_s": 100.0}


@pytest.mark.parametrize(
    ("inside_s", "step_s", "stall_s"),
    [
        (2.0, 18.0, 0.0),  # the link has time to spare
        (0.5, 9.0, 4.5),  # the link needs a second for each group
        (0.0, 9.0, 9.0),
    ],
)
def test_a_step_takes_as_long_as_the_slower_of_compute_device_and_link(inside_s, step_s, stall_s):
    made = forecast(**NINE, times=dict.fromkeys(range(9), LayerTime(inside_s, 0.0)))
    assert made.step_s == pytest.approx(step_s)
    assert made.stall_s == pytest.approx(stall_s)


def test_without_room_beside_it_a_group_waits_for_its_whole_copy():
    made = forecast(**{**NINE, "capacity": 100}, times=dict.fromkeys(range(9), LayerTime(2.0, 0.0)))
    assert made.step_s == pytest.approx(27.0)
    assert made.stall_s == pytest.approx(9.0)


def test_what_is_computed_between_layers_hides_copies_too():
    times = dict.fromkeys(range(8), LayerTime(0.0, 0.0)) | {8: LayerTime(0.0, 5.0)}
    # Three groups are there when the pass begins; the other six take a second each.
    made = forecast(**NINE, times=times)
    assert made.step_s == pytest.approx(11.0)
    assert made.stall_s == pytest.approx(6.0)


def test_any_order_can_be_forecast():
    made = forecast(**NINE, times=dict.fromkeys([0, 2, 1, *range(8, 2, -1)], LayerTime(2.0, 0.0)))
    assert made.step_s == pytest.approx(18.0)


A_CHAIN = [UnitCall(f"unit {n}", {n: 100, -1: 50}, {n + 1: 100}, inside_s=2.0, after_s=0.5) for n in range(6)]


def test_what_a_donor_has_is_not_sent_again():
    made = forecast_relay(A_CHAIN, {f"unit {n}": "a" for n in (1, 2, 3)})
    assert (made.bytes_sent, made.bytes_brought) == (100 + 50, 300)


def test_every_change_of_device_costs_a_crossing():
    there_and_back = forecast_relay(A_CHAIN, {f"unit {n}": "a" for n in (1, 3, 5)})
    assert (there_and_back.bytes_sent, there_and_back.bytes_brought) == (3 * 100 + 50, 300)
    two = forecast_relay(A_CHAIN, {"unit 1": "a", "unit 2": "b", "unit 3": "a"})
    assert (two.bytes_sent, two.bytes_brought) == (3 * (100 + 50), 300)


def test_a_tensor_that_was_written_is_sent_again():
    written = [UnitCall("one", {1: 10, 2: 30}, {3: 10}), UnitCall("two", {3: 10, 4: 30}, {5: 10})]
    made = forecast_relay(written, {"one": "a", "two": "a"})
    assert (made.bytes_sent, made.bytes_brought) == (10 + 30 + 30, 20)


def test_with_a_fast_link_relay_takes_no_longer():
    for donor_of in ({}, {"unit 5": "a"}, {f"unit {n}": "ab"[n % 2] for n in range(6)}):
        assert forecast_relay(A_CHAIN, donor_of).seconds == pytest.approx(15.0)


def test_home_waits_for_what_crosses_the_link():
    donor_of = {f"unit {n}": "a" for n in (3, 4, 5)}
    # 150 bytes go out, and of what comes back only the last is waited for: what comes before is on its way meanwhile.
    assert forecast_relay(A_CHAIN, donor_of, 100.0).seconds == pytest.approx(3 * 2.5 + 1.5 + 3 * 2.0 + 1.0 + 0.5)


def test_home_works_while_a_donor_does():
    """On what does not come from there."""
    calls = [UnitCall("there", {1: 1}, {}, inside_s=3.0, after_s=2.0), UnitCall("here", {1: 1}, {}, inside_s=2.0)]
    assert forecast_relay(calls, {"there": "a"}).seconds == pytest.approx(4.0)


@pytest.mark.parametrize(("segments", "seconds"), [(2, 12.0), (4, 10.0), (8, 9.0)])
def test_a_pair_alternates_over_two_devices(segments, seconds):
    """One input alone takes 8 s; the second begins when the first is through its first segment."""
    calls = [UnitCall(f"{number}", {0: 10}, {1: 10}, inside_s=1.0) for number in range(8)]
    device_of = {f"{number}": number * segments // 8 % 2 for number in range(8)}
    assert forecast_pair(calls, device_of) == pytest.approx(seconds)


def test_what_a_pair_carries_over_takes_its_time():
    calls = [UnitCall(name, {0: 10}, {1: 10}, inside_s=1.0) for name in "ab"]
    assert forecast_pair(calls, {"a": 0, "b": 1}, 20.0) == pytest.approx(3.5)
    assert forecast_pair(calls, {"a": 0, "b": 0}, 20.0) == pytest.approx(4.0)
