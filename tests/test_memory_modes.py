"""On a GPU: every memory mode that ComfyUI can be started in.

Latents are compared with those of ComfyUI's own model, all on the GPU and without any flag: with DynamicVRAM ComfyUI
gives other bits for scaled fp8.
"""

import functools
import json
import os
import subprocess
import sys

import pytest
from conftest import COMFYUI_PATH, ROOT

MODES = [
    (),
    ("--dynamic-vram",),
    ("--novram",),
    ("--lowvram",),
    ("--highvram",),
    ("--gpu-only",),
    ("--disable-smart-memory",),
    ("--disable-mmap",),
    ("--disable-pinned-memory",),
    ("--disable-async-offload",),
]


@functools.cache
def run_in_mode(checkpoint, flags):
    """Run `in_process_mode.py`; what it prints."""
    command = [sys.executable, str(ROOT / "tests" / "in_process_mode.py"), checkpoint, *flags]
    environment = dict(os.environ, COMFYUI_PATH=str(COMFYUI_PATH))
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "flags"),
    [*(("sd15_blocks", flags) for flags in MODES), *(("sd3_fp8_scaled", flags) for flags in MODES[:2])],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "default",
)
def test_weights_on_the_cpu_give_the_same_bits(checkpoints, kind, flags):
    expected = run_in_mode(checkpoints(kind), ())["core's latents"]
    seen = run_in_mode(checkpoints(kind), flags)
    assert ("Dynamic" in seen["core patcher"]) == (flags == ("--dynamic-vram",))
    resident, partly, fully, on_disk = seen["runs"]
    assert resident["streamed"] == 0 < partly["streamed"] < fully["streamed"]
    assert partly["copies"] > 0
    # Weights that ComfyUI's loader has copied, or has read without a mapping, are in no file that is known.
    assert fully["groups in the checkpoint"] == 0
    assert (on_disk["groups in the checkpoint"] > 0) == (flags != ("--disable-mmap",))
    assert bool(resident["evicted"]) == (flags == ("--novram",))  # where ComfyUI grants nothing
    if kind == "sd15_blocks":
        assert seen["core's latents"] == expected
    assert seen["distributed"]["latents"] == expected
    assert seen["distributed"]["copies"] > 0
    assert seen["distributed"]["core's before and after"] == 2 * [seen["core's latents"]]
    for run in seen["runs"]:
        assert run["latents"] == expected
        assert run["as planned"]
