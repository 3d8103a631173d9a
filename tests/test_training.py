"""ComfyUI's own node that trains a LoRA, on a model whose weights are split: what core's model learns, to the bit."""

import comfy.model_management as mm
import comfy_extras.nodes_train as train_nodes
import pytest
import torch
from placing import (
    built_on_the_host,  # noqa: F401
    devices_known_to_comfyui,  # noqa: F401
    inference_mode,  # noqa: F401
    on_donor,
)
from sampling import core_load

KIND = "sd3_no_clip_weights"
STEPS = 3


def trained(model, bypass, checkpointing, offloading):
    """(the LoRA's tensors by name, the losses)."""
    generator = torch.Generator().manual_seed(2)
    with torch.inference_mode(False):
        latents = [{"samples": torch.randn(2, 16, 8, 8, generator=generator)}]
        text, pooled = torch.randn(1, 7, 4096, generator=generator), torch.randn(1, 2048, generator=generator)
    torch.manual_seed(5)
    options = {
        "batch_size": 1,
        "steps": STEPS,
        "grad_accumulation_steps": 1,
        "learning_rate": 0.01,
        "rank": 4,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "seed": 3,
        "training_dtype": "fp32",
        "lora_dtype": "fp32",
        "quantized_backward": False,
        "algorithm": "LoRA",
        "gradient_checkpointing": checkpointing,
        "checkpoint_depth": 1,
        "offloading": offloading,
        "existing_lora": "[None]",
        "bucket_mode": False,
        "bypass_mode": bypass,
    }
    inputs = {name: [value] for name, value in options.items()}
    positive = [[[text, {"pooled_output": pooled}]]]
    weights, losses, _ = train_nodes.TrainLoraNode.execute(
        model=[model], latents=latents, positive=positive, **inputs
    ).result
    mm.unload_all_models()
    return {name: tensor.detach().cpu() for name, tensor in weights.items()}, losses["loss"]


@pytest.mark.parametrize("offloading", [False, True], ids=["", "offloading"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("bypass", [False, True], ids=["", "bypass"])
@pytest.mark.usefixtures("built_on_the_host")  # where the LoRA's first weights are drawn, then
def test_a_lora_trained_on_a_split_model_is_that_of_the_whole_one(checkpoints, bypass, checkpointing, offloading):
    expected, losses = trained(core_load(checkpoints(KIND))[0], bypass, checkpointing, offloading)
    assert len(losses) == STEPS
    assert any(tensor.abs().sum() > 0 for name, tensor in expected.items() if "up" in name or "diff" in name)
    for percent in (50, 100):
        model = on_donor(checkpoints, KIND, percent)[0]
        found, of_ours = trained(model, bypass, checkpointing, offloading)
        assert of_ours == losses
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
