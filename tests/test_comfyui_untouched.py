"""Nothing of ComfyUI is patched, by importing the pack or by loading with it."""

import json
import os
import subprocess
import sys

import pytest
from conftest import COMFYUI_PATH, ROOT


def probe(checkpoint, *plant):
    command = [sys.executable, str(ROOT / "tests" / "comfyui_snapshot.py"), checkpoint, *plant]
    environment = dict(os.environ, COMFYUI_PATH=str(COMFYUI_PATH))
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def seen(checkpoints):
    return probe(checkpoints("sd3"))


def test_every_function_and_class_attribute_is_the_same_object_afterwards(seen):
    assert seen["compared"] > 10_000
    assert seen["changed_by_import"] == []
    assert seen["changed"] == []


def test_importing_the_pack_imports_and_initialises_nothing_else(seen):
    assert seen["imported"] == ["pack"]
    assert not seen["accelerator_touched_by_import"]


PLANTED = ["comfy.model_management.free_memory", "comfy.model_patcher.ModelPatcher.detach"]


@pytest.fixture(scope="module")
def seen_with_plants(checkpoints):
    return probe(checkpoints("sd3_no_clip_weights"), *PLANTED)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_patch_is_found(seen_with_plants, name):
    assert name in seen_with_plants["changed"]
