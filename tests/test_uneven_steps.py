"""Steps that differ, and models that are unloaded between prompts: what is known of the order is kept."""

import contextlib

import comfy.model_management as mm
import pytest
import torch
from placing import (
    COMPUTE,
    DONOR,
    RESIDENT,
    devices_known_to_comfyui,  # noqa: F401
    inference_mode,  # noqa: F401
    on_donor,
    partly_on_donor,
)
from sampling import core_load, output

from distorch2.comfyui.program import COMFYUI
from distorch2.loading import load_checkpoint
from distorch2.planning.schedule import Schedule


@pytest.fixture
def late(monkeypatch):
    """The groups that were fetched when one of their layers ran, and not before."""
    found, enter = [], Schedule.enter

    def watched(schedule, layer):
        groups = enter(schedule, layer)
        if schedule._group_of[layer] in groups:
            found.append(schedule._group_of[layer])
        return groups

    monkeypatch.setattr(Schedule, "enter", watched)
    return found


@contextlib.contextmanager
def shortened(model, num_double=2, num_single=2):
    """Only the first double blocks and the last single ones, as step caches run them."""
    module = model.model.diffusion_model
    whole = module.double_blocks, module.single_blocks
    module.double_blocks = torch.nn.ModuleList(list(whole[0])[:num_double])
    module.single_blocks = torch.nn.ModuleList(list(whole[1])[-num_single:])
    try:
        yield
    finally:
        module.double_blocks, module.single_blocks = whole


@pytest.mark.quick("FSS-50")
@pytest.mark.parametrize("percent", [50, 100])
@pytest.mark.parametrize("pattern", ["FS", "FSS", "FSSSSS"])
def test_full_steps_keep_their_prefetch(checkpoints, late, pattern, percent):
    core_model = core_load(checkpoints("flux"))[0]
    expected = {"F": output(core_model)}
    with shortened(core_model):
        expected["S"] = output(core_model)
    mm.unload_all_models()
    model = on_donor(checkpoints, "flux", percent)[0]
    for _ in range(2):
        assert torch.equal(output(model), expected["F"])
    version = model.distribution.streamer._schedule.version
    for step in pattern * 4:
        late.clear()
        with contextlib.nullcontext() if step == "F" else shortened(model):
            assert torch.equal(output(model), expected[step])
        assert len(late) <= 1
    assert model.distribution.streamer._schedule.version == version


def test_the_order_is_known_after_an_unload(checkpoints, late):
    _, clip, _ = load_checkpoint(checkpoints("sd3"), partly_on_donor(100), partly_on_donor(100), COMPUTE)
    tokens = clip.tokenize("a red cube on a table")
    clip.encode_from_tokens(tokens)
    assert len(late) == len([group for group in clip.patcher.distribution.plan.groups if group.is_streamed])
    for _ in range(2):
        mm.unload_all_models()
        late.clear()
        clip.encode_from_tokens(tokens)
        assert len(late) == 1
    mm.unload_all_models()


# --- tables


def test_of_an_embedding_only_the_rows_travel(checkpoints):
    plan = load_checkpoint(checkpoints("sd3"), RESIDENT, partly_on_donor(100), COMPUTE)[1].patcher.distribution.plan
    tables = {group.layers[0].name: group for group in plan.groups if group.is_table}
    (name,) = (name for name in tables if name.endswith("token_embedding"))
    assert tables[name].num_bytes == 49408 * 768 * 2  # of two bytes each
    assert plan.staging_bytes < tables[name].num_bytes / 3
    assert {plan.how_served(item) for item in plan.placements if item.layer.name == name} == {"looked up"}


@pytest.mark.parametrize("kind", ["function", "keyword", "called twice"])
def test_an_embedding_gives_the_bits_of_the_whole_table(kind, monkeypatch):
    import comfy.ops

    from distorch2.planning.plan import Placement, Plan
    from distorch2.serving.distribution import Distribution
    from distorch2.weights.inventory import list_layers

    monkeypatch.setattr("distorch2.weights.inventory.LEAST_TABLE_BYTES", 1)
    embedding = comfy.ops.manual_cast.Embedding(1000, 8, dtype=torch.float16)
    torch.nn.init.normal_(embedding.weight)
    if kind == "function":
        embedding.weight_function = [lambda weight: weight * torch.arange(1000, device=weight.device)[:, None].half()]
    numbers = torch.tensor([[3, 999, 3], [0, 7, 7]])

    def looked_up():
        if kind == "keyword":
            return embedding(input=numbers.to(COMPUTE), out_dtype=torch.float32)
        return embedding(numbers.to(COMPUTE), out_dtype=torch.float32)

    expected = looked_up().cpu()
    module = torch.nn.Sequential(embedding)
    plan = Plan(COMPUTE, tuple(Placement(layer, DONOR) for layer in list_layers(module)))
    distribution = Distribution(module, plan, COMFYUI)
    distribution.place(plan)
    for _ in range(2):
        assert torch.equal(looked_up().cpu(), expected)
    assert embedding.weight.device == torch.device(DONOR)
    assert distribution.transfer.copies == 0
    distribution.release({})
    assert "forward" not in vars(embedding)
