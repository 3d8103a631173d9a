import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
from simulator import LayerTime, forecast

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
