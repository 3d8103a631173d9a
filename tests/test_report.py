import pytest

from distorch2.planning.plan import Layer, Placement, Plan
from distorch2.report import render_table, rows_of_plan

pytestmark = pytest.mark.quick

MIB = 1024**2


def test_one_row_for_each_device_the_compute_device_first():
    placements = [("a", 100, "cpu"), ("b", 200, "cuda:1"), ("c", 100, "cpu")]  # 400 MiB: 50% each
    plan = Plan("cuda:1", tuple(Placement(Layer(name, mib * MIB), device) for name, mib, device in placements))
    assert render_table("title", rows_of_plan("diffusion model", plan), ["a note"]) == (
        "title\n"
        "  component        device  served    layers    MiB  share\n"
        "  diffusion model  cuda:1  resident       1  200.0  50.0%\n"
        "  diffusion model  cpu     streamed       2  200.0  50.0%\n"
        "  note: a note"
    )


def test_a_donor_that_computes_with_a_part_of_its_weights():
    layers = [Layer("a", MIB), Layer("b.0", MIB, unit="b.0"), Layer("b.1", MIB, unit="b.1"), Layer("c", MIB)]
    devices = ["cuda:0", "cuda:1", "cuda:1", "cuda:1"]
    plan = Plan("cuda:0", tuple(map(Placement, layers, devices)), relays=("cuda:1",))
    assert [(row.device, row.served, row.num_layers, row.share) for row in rows_of_plan("model", plan)] == [
        ("cuda:0", "resident", 1, 0.25),
        ("cuda:1", "relayed", 2, 0.5),
        ("cuda:1", "streamed", 1, 0.25),
    ]


def test_what_is_packed():
    blocks = [Layer(f"blocks.{number}", MIB, True, MIB, is_bf16=True) for number in range(64)]
    placements = [Placement(layer, "cpu" if number < 8 else "cuda:0") for number, layer in enumerate(blocks)]
    plan = Plan("cuda:0", tuple(placements), pack_weights="on").within(57 * MIB)
    assert plan.packed_residents
    assert not plan.evicted
    num_packed = sum(len(group.layers) for group in plan.packed_residents)
    assert [(row.device, row.served, row.num_layers) for row in rows_of_plan("model", plan)] == [
        ("cuda:0", "resident", 56 - num_packed),
        ("cuda:0", "packed", num_packed),
        ("cpu", "streamed, packed", 8),
    ]


def test_a_model_without_weights_has_no_rows():
    assert rows_of_plan("text encoder", Plan("cpu", ())) == []
