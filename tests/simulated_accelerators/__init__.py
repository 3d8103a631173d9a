"""A custom node pack for tests: accelerators `sim:0` and `sim:1`, for machines that have none, or as many as the
environment variable SIMULATED_DEVICES says.

A tensor on one is memory of the host that claims a device: torch computes with it as with the host's, to the same bits,
but refuses to mix it with tensors of other devices, as it does with CUDA's. Each device has a capacity (environment
variable SIMULATED_CAPACITY_MB, default 1024) and counts what it holds and what is copied.

In a test `tell_comfyui(monkeypatch.setattr)` makes ComfyUI know the devices, which then lend memory to the CPU, and
with `compute="sim:0"` compute themselves. As a pack it is told by the environment: SIMULATED_COMPUTE=sim:0. Further:
SIMULATED_INFERENCE_MB, and SIMULATED_DEFERRED_COPIES=1, see `deferred_copies`.
"""

from __future__ import annotations

from .comfyui import serve_routes, tell_comfyui
from .devices import NUM_DEVICES, capacity_bytes, deferred_copies, peak_bytes, used_bytes
from .tensor import counters, install

__all__ = ["NODE_CLASS_MAPPINGS", "NUM_DEVICES", "capacity_bytes", "counters", "deferred_copies", "tell_comfyui"]
__all__ += ["peak_bytes", "used_bytes"]

install()
NODE_CLASS_MAPPINGS: dict[str, type] = {}
if __name__ != "simulated_accelerators":  # imported by ComfyUI as a pack, under its own name for it
    tell_comfyui()
    serve_routes()
