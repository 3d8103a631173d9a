"""torch.compile of a model whose weights are streamed: the same bits, and nothing compiled for every layer.

Compiling is slow in itself: most of these tests' time is Dynamo's.
"""

import comfy.model_management as mm
import comfy_extras.nodes_torch_compile as compile_nodes
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from placing import (
    devices_known_to_comfyui,  # noqa: F401
    inference_mode,  # noqa: F401
    lora_for,
    on_donor,
)
from test_compatibility import MMDIT, PERCENTAGES, assert_same_bits, latents, model_of
from test_compatibility import checkpoints as checkpoints


@pytest.fixture
def compiling():
    """Starts with nothing compiled, and leaves nothing."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def compiled(model, backend):
    return model_of(compile_nodes.TorchCompileModel.execute(model, backend))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model(checkpoints, compiling, backend):
    def run(model, clip, _):
        torch._dynamo.reset()
        fast = compiled(model, backend)
        made = [latents(fast, clip, steps=2) for _ in range(2)]
        mm.unload_all_models()
        made += [latents(each, clip, steps=2) for each in (fast, model, compiled(lora_for(model), backend))]
        return [*made, latents(fast, clip, steps=2)]

    first, *_, with_lora, _ = assert_same_bits(checkpoints, MMDIT, run, minimum_copies=3)
    assert not torch.equal(first, with_lora)


def constant_free_memory(device=None, torch_free_too=False):
    return (2**34, 2**34) if torch_free_too else 2**34


@pytest.mark.parametrize("kind", [MMDIT, "flux_small"])
def test_dynamo_compiles_once_and_not_per_layer(checkpoints, compiling, kind, monkeypatch):
    """Where it hits its limit it gives up, and the run is slower than one that is not compiled.

    ComfyUI's own layers may hit it, each time that they are called from what is not compiled.
    """
    # ComfyUI's attention asks for free memory, and is compiled again when the answer has changed.
    monkeypatch.setattr(mm, "get_free_memory", constant_free_memory)
    for percent in PERCENTAGES:
        model, clip, _ = on_donor(checkpoints, kind, percent)
        torch._dynamo.reset()
        compiling.clear()
        fast = compiled(model, "eager")
        latents(fast, clip)
        frames = compiling["frames"]["total"]
        latents(fast, clip)
        mm.unload_all_models()
        latents(fast, clip)
        limits = [reason for reason in compiling["unimplemented"] if "recompile limit" in reason]
        assert [reason for reason in limits if "distorch2" in reason] == []
        assert frames > 0
        assert compiling["frames"]["total"] == frames


def test_what_cannot_be_compiled_in_one_piece_is_refused_and_what_breaks_off_is_said(checkpoints, caplog):
    model, clip, _ = on_donor(checkpoints, MMDIT, 50)
    set_torch_compile_wrapper(whole := model.clone(), "eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r"fullgraph=True cannot compile a model with \d+ layers on donors"):
        latents(whole, clip, steps=1)
    with caplog.at_level("INFO"):
        for _ in range(2):
            mm.load_models_gpu([compiled(model, "eager")], force_full_load=True)
            mm.unload_all_models()
    assert len([record for record in caplog.records if "cannot compile across the" in record.getMessage()]) == 1
