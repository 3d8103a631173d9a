from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from allocation_parser import parse_allocation
from distorch2.planning.plan import (
    GIB,
    PACK_MODES,
    STREAMED_ONLY,
    ComponentRequest,
    DeviceMemory,
    Layer,
    Plan,
    PlanError,
    VirtualVram,
)
from distorch2.planning.planner import make_plan, plan_alternating, plan_beside

pytestmark = pytest.mark.quick

MEMORY = {
    "cpu": DeviceMemory(64 * GIB),
    "cuda:0": DeviceMemory(24 * GIB, 24 * GIB),
    "cuda:1": DeviceMemory(24 * GIB, 24 * GIB),
}
TWELVE = [Layer(f"block.{i}", 100) for i in range(12)]  # 1,200 bytes


def plan(layers, allocation, compute_device="cuda:0", memory=MEMORY, donor_mode="auto"):
    if isinstance(allocation, str):
        allocation = parse_allocation(allocation)
    return make_plan(layers, ComponentRequest(compute_device, allocation, donor_mode), memory)


def drawing(plan):
    """One character a layer: '.' on the compute device, else the last character of the device's name."""
    return "".join("." if p.device == plan.compute_device else p.device[-1] for p in plan.placements)


@pytest.mark.parametrize(
    ("allocation", "expected"),
    [
        ("cuda:0,100%", "............"),
        ("cuda:0,50%;cpu,50%", ".u.u.u.u.u.u"),
        ("cuda:0,75%;cpu,*", "..u...u...u."),
        ("cuda:0,300b;cpu,*", "u.uuu.uuu.uu"),
        ("cpu,*", "uuuuuuuuuuuu"),  # the compute device is absent: nothing is resident
        ("cuda:0,50%;cuda:1,25%;cpu,25%", ".1.u.1.u.1.u"),
    ],
)
def test_streamed_layers_are_spread_evenly_over_the_execution_order(allocation, expected):
    assert drawing(plan(TWELVE, allocation)) == expected


@pytest.mark.parametrize("num_streamed", range(1, 12))
def test_the_gaps_between_streamed_layers_differ_by_one_at_most(num_streamed):
    text = drawing(plan(TWELVE, f"cuda:0,{(12 - num_streamed) * 100}b;cpu,*"))
    streamed = [i for i, c in enumerate(text) if c == "u"]
    assert len(streamed) == num_streamed
    gaps = {later - earlier for earlier, later in zip(streamed, streamed[1:])}
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("virtual_vram_bytes", "donor", "resident"),
    [
        (0, "cpu", 1200),
        (600, "cpu", 600),
        (600, "cuda:1", 600),
        (5000, "cpu", 0),  # min(virtual VRAM, model)
        (600, "cuda:0", 1200),  # the donor is the compute device
    ],
)
def test_virtual_vram(virtual_vram_bytes, donor, resident):
    made = plan(TWELVE, VirtualVram(virtual_vram_bytes / GIB, donor))
    assert made.bytes_on("cuda:0") == resident
    assert made.bytes_on("cuda:0") + (made.bytes_on(donor) if donor != "cuda:0" else 0) == 1200


@pytest.mark.parametrize("gb", [-0.1, float("nan"), float("inf")])
def test_virtual_vram_must_be_a_size(gb):
    with pytest.raises(PlanError, match="use 0 or more"):
        VirtualVram(gb, "cpu")


def test_a_fraction_is_of_the_devices_total_memory():
    memory = {"cpu": DeviceMemory(10_000), "cuda:0": DeviceMemory(2_000, 1_900)}
    assert plan(TWELVE, "cuda:0,0.25;cpu,*", memory=memory).bytes_on("cuda:0") == 500  # a quarter of 2,000


def test_what_does_not_fit_a_donor_goes_to_cpu_and_is_said():
    memory = dict(MEMORY, **{"cuda:1": DeviceMemory(24 * GIB, 2 * GIB)})
    layers = [Layer(f"block.{i}", GIB) for i in range(12)]
    made = plan(layers, VirtualVram(6.0, "cuda:1"), memory=memory)
    assert {device: made.bytes_on(device) // GIB for device in made.devices} == {"cuda:0": 6, "cpu": 4, "cuda:1": 2}
    assert made.notes == ("cuda:1 has 2.00 GiB free of the 6.00 GiB asked; the rest is on cpu",)


def test_free_memory_of_the_compute_device_limits_an_expert_amount():
    memory = dict(MEMORY, **{"cuda:0": DeviceMemory(24 * GIB, 350)})
    made = plan(TWELVE, "cuda:0,100%", memory=memory)
    assert made.bytes_on("cuda:0") == 300
    assert made.bytes_on("cpu") == 900
    assert len(made.notes) == 1


def test_nearly_full_devices_share_what_rounding_leaves():
    layers = [Layer(f"{i}", 100) for i in range(10)]
    memory = {f"cuda:{i}": DeviceMemory(10**4, 330) for i in range(4)} | {"cpu": DeviceMemory(10**4)}
    made = plan(layers, "cuda:0,240b;cuda:1,240b;cuda:2,240b;cuda:3,280b", memory=memory)
    assert made.bytes_on("cpu") == 0  # 200, 300, 200 and 300
    assert made.notes == ()


def test_what_rounding_leaves_no_room_for_is_said():
    memory = {f"cuda:{i}": DeviceMemory(10**4, 250) for i in range(4)} | {"cpu": DeviceMemory(10**4)}
    made = plan([Layer(f"{i}", 100) for i in range(10)], "cuda:0,1%;cuda:1,1%;cuda:2,1%;cuda:3,1%", memory=memory)
    assert made.bytes_on("cpu") == 200  # 250 bytes hold two layers
    assert made.notes == ("0.0 MiB that no other device has room for are on cpu",)


def test_a_layer_without_bytes_needs_no_donor():
    assert plan([Layer("tied", 0), Layer("a", 100)], VirtualVram(0.0, "cuda:1"), compute_device="cpu").donors == ()


def test_layers_that_cannot_move_stay_on_the_compute_device():
    layers = [Layer("a", 100, movable=False), Layer("b", 100), Layer("c", 100), Layer("d", 100, movable=False)]
    assert drawing(plan(layers, "cpu,*")) == ".uu."
    assert plan(layers, "cpu,*").notes == ("0.0 MiB cannot leave cuda:0: shared weights, buffers and the like",)
    assert drawing(plan(layers, "cuda:1,50%;cpu,50%")) == ".1u."  # the 200 bytes left are still halved
    assert drawing(plan(layers, "cuda:0,50%;cpu,50%")) == ".uu."  # the 200 bytes asked are those that cannot move


def test_an_unknown_device_is_refused():
    with pytest.raises(PlanError, match=r"there is no device 'cuda:7'; this machine has cpu, cuda:0, cuda:1"):
        plan(TWELVE, "cuda:7,*")
    with pytest.raises(PlanError, match=r"there is no device 'cuda:9'"):
        plan(TWELVE, "cpu,*", compute_device="cuda:9")


def test_a_model_without_weights_has_an_empty_plan():
    made = plan([], "cuda:0,50%;cpu,50%")
    assert made.placements == ()
    assert made.model_bytes == 0


_devices = ("cuda:0", "cuda:1", "cuda:2", "cpu")
_sizes = st.lists(st.integers(0, 10**9) | st.sampled_from([1, 1000, 10**9]), min_size=1, max_size=60)


def _check_conserved(made, layers):
    assert [placement.layer for placement in made.placements] == layers
    assert sum(made.bytes_on(device) for device in made.devices) == sum(layer.num_bytes for layer in layers)


@settings(max_examples=400, deadline=None)
@given(_sizes, st.lists(st.integers(1, 100), min_size=1, max_size=4), st.sampled_from(_devices))
def test_every_device_is_given_what_was_asked_within_one_layer(sizes, weights, compute_device):
    layers = [Layer(f"{i}", size) for i, size in enumerate(sizes)]
    shares = dict(zip(_devices, weights))
    memory = {device: DeviceMemory(10**12) for device in _devices}
    made = plan(layers, ";".join(f"{device},{weight}%" for device, weight in shares.items()), compute_device, memory)
    _check_conserved(made, layers)
    for device in _devices:
        asked = sum(sizes) * shares.get(device, 0) / sum(weights)
        assert abs(made.bytes_on(device) - asked) < max(sizes) + 1  # 1: shares are whole bytes


@settings(max_examples=400, deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=60), st.lists(st.integers(1, 100), min_size=3, max_size=3))
def test_with_room_for_one_layer_more_nothing_overflows(sizes, weights):
    layers = [Layer(f"{i}", size) for i, size in enumerate(sizes)]
    asked = [sum(sizes) * weight // sum(weights) + 1 for weight in weights]
    memory = {f"cuda:{i}": DeviceMemory(10**12, num_bytes + max(sizes)) for i, num_bytes in enumerate(asked)}
    memory["cpu"] = DeviceMemory(10**12)
    made = plan(layers, ";".join(f"cuda:{i},{weight}%" for i, weight in enumerate(weights)), memory=memory)
    assert made.notes == ()
    for i, num_bytes in enumerate(asked):
        assert abs(made.bytes_on(f"cuda:{i}") - num_bytes) < max(sizes) + 2


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.booleans()), min_size=1, max_size=60),
    st.lists(st.integers(0, 10**8), min_size=3, max_size=3),
    st.lists(st.integers(1, 100), min_size=3, max_size=3),
)
def test_free_memory_is_never_exceeded(sizes, free, weights):
    layers = [Layer(f"{i}", size, movable) for i, (size, movable) in enumerate(sizes)]
    memory = {f"cuda:{i}": DeviceMemory(10**12, free_bytes) for i, free_bytes in enumerate(free)}
    memory["cpu"] = DeviceMemory(10**12)
    made = plan(layers, ";".join(f"cuda:{i},{weight}%" for i, weight in enumerate(weights)), "cuda:0", memory)
    _check_conserved(made, layers)
    fixed_bytes = sum(size for size, movable in sizes if not movable)
    for i, free_bytes in enumerate(free):
        given_bytes = made.bytes_on(f"cuda:{i}")
        assert given_bytes <= (max(free_bytes, fixed_bytes) if i == 0 else free_bytes)


def test_what_is_streamed_is_the_same_in_every_block():
    """The large blocks come first, as in Flux: a plan by bytes would copy more while they run than later."""
    layers = [Layer(f"double.{i}.{j}", 100_000, block=f"double.{i}") for i in range(5) for j in range(24)]
    layers += [Layer(f"single.{i}.{j}", 100_000, block=f"single.{i}") for i in range(10) for j in range(10)]
    made = plan(layers, "cuda:0,50%;cpu,50%")
    streamed = Counter(placement.layer.block for placement in made.streamed)
    assert sum(streamed.values()) == 110
    assert max(streamed.values()) - min(streamed.values()) <= 1
    # A block that has less than its part is streamed whole.
    streamed = Counter(placement.layer.block for placement in plan(layers, "cuda:0,10%;cpu,90%").streamed)
    assert all(streamed[f"single.{i}"] == 10 for i in range(10))


def test_small_layers_stay_on_the_compute_device_as_long_as_it_keeps_anything_else():
    layers = [Layer(f"{kind}.{i}", size) for i in range(50) for kind, size in (("norm", 1000), ("linear", 1_000_000))]
    streamed = [placement.layer.name for placement in plan(layers, "cuda:0,50%;cpu,50%").streamed]
    assert len(streamed) == 25
    assert not any(name.startswith("norm") for name in streamed)
    assert len(plan(layers, "cpu,*").streamed) == 100


def test_the_staging_buffer_has_room_beside_the_resident_layers():
    mib = 1024**2
    layers = [Layer(f"{i}", 100 * mib, slab_bytes=100 * mib) for i in range(100)]
    for free in (2, 5, 9):
        memory = {**MEMORY, "cuda:0": DeviceMemory(24 * GIB, free * GIB)}
        made = plan(layers, "cuda:0,100%", memory=memory)
        assert free * GIB - 400 * mib < made.compute_bytes <= free * GIB
        assert made.bytes_on("cpu") + made.bytes_on("cuda:0") == 10_000 * mib


def test_layers_that_cannot_move_and_do_not_fit_take_nothing_from_the_donors():
    layers = [Layer("fixed", 6 * GIB, movable=False), *(Layer(f"{i}", GIB // 10) for i in range(100))]
    memory = {**MEMORY, "cuda:0": DeviceMemory(24 * GIB, 2 * GIB)}
    made = plan(layers, "cuda:0,6gb;cuda:1,9gb;cpu,*", memory=memory)
    assert made.bytes_on("cuda:1") == pytest.approx(9 * GIB, abs=GIB // 10)


# --- relay

UNITS = [Layer("in", 100), *(Layer(f"blocks.{i}.{j}", 100, unit=f"blocks.{i}") for i in range(6) for j in range(4))]
THREE = {**MEMORY, "cuda:2": DeviceMemory(24 * GIB, 24 * GIB)}


def relayed(made):
    """One character a unit: the last of the device that runs it."""
    return "".join(made.relayed_units.get(f"blocks.{i}", "....0")[-1] for i in range(6))


@pytest.mark.parametrize(
    ("allocation", "expected"),
    [
        ("cuda:0,50%;cuda:1,50%", "000111"),
        ("cuda:1,100%", "111111"),
        ("cuda:1,*", "111111"),
        ("cuda:0,300b;cuda:1,1000b;cuda:2,1200b", "011222"),  # 200 b of each are left, and streamed from there
        ("cuda:0,20%;cuda:1,40%;cpu,40%", "000011"),
        ("cuda:0,90%;cuda:1,10%", "000000"),  # less than a unit
        ("cuda:1,0%;cuda:0,100%", "000000"),
    ],
)
def test_the_last_units_run_on_donors_and_the_rest_is_streamed(allocation, expected):
    made = plan(UNITS, allocation, memory=THREE)
    assert relayed(made) == expected
    streamed = plan(UNITS, allocation, memory=THREE, donor_mode="stream")
    assert relayed(streamed) == "000000"
    for device in THREE:
        assert abs(made.bytes_on(device) - streamed.bytes_on(device)) <= 100
    groups = {(group.is_relayed, layer.unit) for group in made.groups for layer in group.layers}
    assert {unit for is_relayed, unit in groups if is_relayed} == set(made.relayed_units)
    assert sum(len(group.layers) for group in made.groups) == len(made.streamed) + 4 * len(made.relayed_units)


def test_relayed_units_need_no_staging_buffer():
    layers = [Layer(f"blocks.{i}", 100, slab_bytes=256, unit=f"blocks.{i}") for i in range(40)]
    made = plan(layers, "cuda:0,50%;cuda:1,50%")
    assert made.staging_bytes == 0 < made.staging_bytes_of_units
    assert made.compute_bytes == 2000


def test_a_donor_runs_no_more_than_it_has_room_for():
    memory = {**MEMORY, "cuda:1": DeviceMemory(24 * GIB, 900)}
    made = plan(UNITS, "cuda:0,50%;cuda:1,50%", memory=memory)
    assert relayed(made) == "000011"
    assert made.bytes_on("cuda:1") == 900


@pytest.mark.parametrize(
    ("mode", "compute", "donor", "can_compute", "expected"),
    [
        ("auto", "cuda:0", "cuda:1", True, True),
        ("auto", "cuda:0", "cuda:1", False, False),
        ("auto", "cuda:0", "cpu", True, False),
        ("auto", "cpu", "cuda:1", True, False),
        ("relay", "cuda:0", "cpu", True, True),
        ("relay", "cpu", "cuda:1", True, True),
        ("relay", "cuda:0", "cuda:1", False, False),
        ("stream", "cuda:0", "cuda:1", True, False),
    ],
)
def test_who_relays(mode, compute, donor, can_compute, expected):
    memory = {device: DeviceMemory(24 * GIB, 24 * GIB, can_compute or device == compute) for device in MEMORY}
    made = plan(UNITS, f"{compute},50%;{donor},50%", compute, memory, mode)
    assert bool(made.relayed_units) == expected


def test_a_unit_with_a_layer_that_cannot_move_is_relayed_without_it():
    layers = [*UNITS, Layer("blocks.5", 4, movable=False, unit="blocks.5")]
    made = plan(layers, "cuda:0,50%;cuda:1,50%")
    assert relayed(made) == "000111"
    assert made.placements[-1].device == "cuda:0"


def test_a_little_more_or_less_free_memory_moves_nothing():
    """Layers of 10 bytes, in groups of one: what is evicted comes back only as far as two more would fit."""
    layers = [Layer(f"blocks.{index}", 100_000, True, 100_096, f"blocks.{index}") for index in range(64)]
    asked = Plan.all_on("cuda:0", layers)
    assert asked.group_bytes == 200_000  # a 32nd of the model: one layer each
    served = asked.within(asked.compute_bytes - 1_000_000)
    size = served.compute_bytes
    for jitter in (-50_000, 0, 50_000, 200_000, 350_000, 0, 100_000):
        again = asked.within(size + 50_000 + jitter, served)
        assert len(again.evicted) == len(served.evicted)
    assert len(asked.within(size - 300_000, served).evicted) > len(served.evicted)
    assert 0 < len(asked.within(size + 700_000, served).evicted) < len(served.evicted)
    assert asked.within(float("inf"), served) == asked


def test_room_for_packed_groups_is_taken_where_some_may_come_packed():
    mib = 1024**2
    layers = [Layer(f"blocks.{index}", 10 * mib, True, 10 * mib, is_bf16=index % 4 > 0) for index in range(96)]
    memory = {**MEMORY, "cuda:0": DeviceMemory(2**40), "cpu": DeviceMemory(2**40)}
    rooms = {}
    for mode in PACK_MODES:
        for share in (20, 40, 100):
            request = ComponentRequest("cuda:0", parse_allocation(f"cuda:0,{100 - share}%;cpu,*"), pack_weights=mode)
            made = make_plan(layers, request, memory)
            rooms[mode, share] = made.packed_room_bytes
            assert made.is_worth_packing == (share > 20)  # 192 MiB are too few
            assert made.compute_bytes == made.bytes_on("cuda:0") + made.staging_bytes + made.packed_room_bytes
            assert {made.is_streamed_packed(item) for item in made.streamed} == (
                {True, False} if mode == "on" else {False}
            )
    room = 3 * 27 * mib  # of nine tenths of groups of 30 MiB
    assert [rooms["on", share] for share in (20, 40, 100)] == [room, room, room]
    assert [rooms[mode, share] for mode in ("auto", "off") for share in (20, 40, 100)] == [0] * 6

    resident = replace(Plan.all_on("cuda:0", layers), pack_weights=STREAMED_ONLY)
    assert resident.packed_room_bytes == 0
    assert resident.within(resident.compute_bytes) == resident
    for lacking in (1, 100 * mib, 500 * mib):
        within = resident.within(resident.compute_bytes - lacking)
        assert within.compute_bytes <= resident.compute_bytes - lacking
    assert within.packed_room_bytes == room


def test_a_table_needs_no_staging_buffer_and_is_a_group_of_its_own():
    layers = [
        Layer("first", 1000, True, 1024),
        Layer("table", 50_000, True, 50_176, is_table=True),
        *(Layer(f"blocks.{index}", 1000, True, 1024) for index in range(40)),
    ]
    made = plan(layers, "cpu,*")
    (table,) = (group for group in made.groups if group.is_table)
    assert [layer.name for layer in table.layers] == ["table"]
    assert made.staging_bytes < 41 * 1024
    assert [made.how_served(item) for item in made.placements[:3]] == ["streamed", "looked up", "streamed"]
    assert "table" not in {item.layer.name for item in made.streamed}
    evicted = Plan.all_on("cuda:0", layers).within(0)
    assert any(group.is_table for group in evicted.evicted)
    assert evicted.compute_bytes < 41 * 1024


def test_the_roles_of_two_devices_are_exchanged():
    layers = [Layer(f"blocks.{index}", 1000, True, 1024) for index in range(10)]
    made = plan(layers, "cuda:0,50%;cuda:1,30%;cpu,20%")
    other = made.exchanged("cuda:1", layers)
    assert other.compute_device == "cuda:1"
    assert (other.bytes_on("cuda:1"), other.bytes_on("cuda:0")) == (made.bytes_on("cuda:0"), made.bytes_on("cuda:1"))
    assert other.bytes_on("cpu") == made.bytes_on("cpu")
    assert other.relays == tuple({"cuda:1": "cuda:0"}.get(relay, relay) for relay in made.relays)
    elsewhere = made.exchanged("cuda:2", layers)
    assert elsewhere.bytes_on("cuda:2") == made.bytes_on("cuda:0")
    assert elsewhere.bytes_on("cuda:0") == 0


TWELVE_UNITS = [Layer(f"blocks.{index}.{part}", 100, unit=f"blocks.{index}") for index in range(12) for part in "ab"]


@pytest.mark.parametrize(
    ("allocation", "expected"),
    [
        ("cuda:0,50%;cuda:1,50%", "..11..11..11"),
        ("cuda:0,75%;cuda:1,25%", "...1...1...1"),
        ("cuda:0,10%;cuda:1,90%", "1111.1111111"),
        ("cuda:0,34%;cuda:1,33%;cuda:2,33%", ".12..1122.12"),
    ],
)
def test_units_that_alternate(allocation, expected):
    layers = [Layer("first", 10), *TWELVE_UNITS, Layer("last", 10)]
    asked = plan(layers, allocation, memory={**MEMORY, "cuda:2": DeviceMemory(24 * GIB)})
    made = plan_alternating(asked, layers)
    text = drawing(made)
    assert text[0] == text[-1] == "."
    assert text[1:-1:2] == text[2:-1:2] == expected


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=60), st.lists(st.integers(1, 100), min_size=2, max_size=4))
def test_units_that_alternate_take_what_was_asked_of_donors_and_no_more(sizes, weights):
    layers = [Layer(f"blocks.{index}", size, unit=f"blocks.{index}") for index, size in enumerate(sizes)]
    memory = {f"cuda:{index}": DeviceMemory(GIB) for index in range(len(weights))} | {"cpu": DeviceMemory(GIB)}
    allocation = ";".join(f"cuda:{index},{weight}%" for index, weight in enumerate(weights))
    asked = plan(layers, allocation, memory=memory)
    made = plan_alternating(asked, layers)
    assume(made is not None)
    assert [item.layer for item in made.placements] == layers
    assert set(made.relayed_units) == {item.layer.unit for item in made.placements if item.device != "cuda:0"}
    for donor in asked.relays:
        assert made.bytes_on(donor) <= asked.bytes_on(donor)
    excess = made.bytes_on("cuda:0") - asked.bytes_on("cuda:0")
    assert excess < len(asked.relays) * max(sizes)


def test_what_cannot_alternate():
    for allocation in ("cuda:0,50%;cuda:1,40%;cpu,10%", "cuda:1,*", "cuda:0,*"):
        asked = plan(TWELVE_UNITS, allocation)
        assert plan_alternating(asked, TWELVE_UNITS) is None


def test_devices_that_keep_equally_much_to_a_layer_keep_the_same():
    layers = [Layer(f"blocks.{index}", 100 + index, block=f"blocks.{index // 4}") for index in range(40)]
    asked = plan(layers, "cuda:0,2390b;cuda:1,*", donor_mode="stream")
    # 100 + ... + 139 is 4780, of which half is 2390; the largest layer has 139.
    assert 0 < abs(asked.bytes_on("cuda:0") - asked.bytes_on("cuda:1")) < 140
    plans = [plan_beside(asked, layers, *devices) for devices in (("cuda:0", ["cuda:1"]), ("cuda:1", ["cuda:0"]))]
    kept = [plan.layers_on(plan.compute_device) for plan in plans]
    assert kept[0] == kept[1]
    assert sum(layer.num_bytes for layer in kept[0]) <= 2390 + 140


@pytest.mark.parametrize(
    ("free", "text", "expected"),
    [
        ({"cuda:0": 2000}, "auto", {"cuda:0": 1200}),
        ({"cuda:0": 500, "cuda:1": 2000}, "auto", {"cuda:0": 500, "cuda:1": 700}),
        ({"cuda:0": 500, "cuda:1": 300, "cuda:2": 400}, "auto", {"cuda:0": 500, "cuda:2": 400, "cuda:1": 300}),
        ({"cuda:0": 600, "cuda:1": 300}, "auto;keep=100b", {"cuda:0": 500, "cuda:1": 200, "cpu": 500}),
        ({"cuda:0": 50, "cuda:1": 0}, "auto;keep=100b", {"cpu": 1200}),
        ({"cuda:0": 500, "xpu:0": 2000}, "auto", {"cuda:0": 500, "cpu": 700}),  # of another kind
    ],
)
def test_auto_fills_the_compute_device_then_others_of_its_kind(free, text, expected):
    memory = {device: DeviceMemory(4000, num_bytes) for device, num_bytes in free.items()} | {"cpu": DeviceMemory(GIB)}
    made = plan(TWELVE, parse_allocation(text, (*memory, "disk")), memory=memory)
    assert {device: made.bytes_on(device) for device in made.devices if made.bytes_on(device)} == expected
    assert not made.notes or "cpu" in made.notes[0]


@given(_sizes, st.lists(st.integers(0, 20_000), min_size=1, max_size=4), st.integers(0, 5000))
def test_auto_takes_what_is_free_to_a_layer_and_places_everything(sizes, free, keep):
    layers = [Layer(f"{index}", size, slab_bytes=size) for index, size in enumerate(sizes)]
    memory = {f"cuda:{index}": DeviceMemory(10**9, num_bytes) for index, num_bytes in enumerate(free)}
    memory["cpu"] = DeviceMemory(10**12)
    made = plan(layers, parse_allocation(f"auto;keep={keep}b", tuple(memory)), memory=memory)
    assert sum(made.bytes_on(device) for device in memory) == sum(sizes)
    for device, device_memory in memory.items():
        if device_memory.free_bytes is not None:
            assert made.bytes_on(device) <= device_memory.free_bytes
            assert made.bytes_on(device) <= max(0, device_memory.free_bytes - keep) + max(sizes, default=0)
