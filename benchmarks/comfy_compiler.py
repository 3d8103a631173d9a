"""On one GPU: streaming inside ComfyUI's compiler, which serves the memory of a forward from a recorded plan.

    python3 tools/host.py run benchmarks/comfy_compiler.py [FOLDER]

Needs comfy-aimdo 0.5 or later. The Flux-sized model, half of it on the CPU, runs forwards as ComfyUI 0.34 and later run
those of models that it compiles: recorded the first time, repeated from then on, block by block. Its output is compared
with that of the resident model, and every break of the recording is counted. Resident and streamed forwards are timed
with the compiler and without it. FOLDER (default /dev/shm) needs room for the model's file.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from harness import saved_model, start_comfyui, step, steps_ms, warmed_up
from record import record_printed_by

NUM_FORWARDS = 8


class Recorded:
    """A model of `models.py` whose forwards are recorded and repeated, each block in a scope of its own."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._graph: Any = None
        self.breaks: list[int] = []
        """Of each forward."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def step(self, patcher: Any, inputs: Any) -> Any:
        import comfy_aimdo.malloc_graph
        import torch

        module = patcher.model.diffusion_model
        breaks = 0

        def enter_block(block: torch.nn.Module, arguments: Any, options: Any) -> None:
            nonlocal breaks
            breaks += bool(self._graph.iterate("block"))

        def leave_blocks(layer: torch.nn.Module, arguments: Any, options: Any) -> None:
            nonlocal breaks
            breaks += bool(self._graph.iterate(None))

        hooks = [
            block.register_forward_pre_hook(enter_block, with_kwargs=True)
            for block in (*module.double_blocks, *module.single_blocks)
        ]
        hooks.append(module.final_layer.register_forward_pre_hook(leave_blocks, with_kwargs=True))
        result = torch.empty_like(inputs["x"])  # what outlives the forward is allocated before it
        try:
            if self._graph is None:
                self._graph = comfy_aimdo.malloc_graph.record(torch.cuda.current_stream())
            else:
                self._graph.push()
            output = self._model.step(patcher, inputs)
            result.copy_(output)
            del output
            breaks += bool(self._graph.pop())
        finally:
            for hook in hooks:
                hook.remove()
        self.breaks.append(breaks)
        return result

    @property
    def facts(self) -> dict[str, int]:
        """Bytes of the plan, and allocations that did not fit it, as the compiler counts them."""
        graph = self._graph
        return {"plan bytes": graph.physical_bytes, "allocations outside the plan": graph.rogue_count}


def measure(path: str) -> dict[str, Any]:
    start_comfyui(dynamic_vram=True)
    import models
    import torch

    from distorch2.plan import ComponentRequest, VirtualVram

    torch.set_grad_enabled(False)
    flux, patchers = models.FLUX, {}
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for name, gib in (("resident", 0.0), ("half on the CPU", 11.1)):
            patchers[name] = flux.distributed(path, ComponentRequest("cuda:0", VirtualVram(gib, "cpu")))
            patchers[name].patch_model()
        for case in flux.cases:
            inputs = flux.inputs(case)
            expected = warmed_up(flux, patchers["resident"], inputs)
            for name, patcher in patchers.items():
                recorded = Recorded(flux)
                outputs = [step(recorded, patcher, inputs) for _ in range(NUM_FORWARDS)]
                found.setdefault(case, {})[name] = {
                    "bit-identical": all(torch.equal(output, expected) for output in outputs),
                    "breaks by forward": recorded.breaks,
                    **recorded.facts,
                    "ms with it": round(statistics.median(steps_ms(recorded, patcher, inputs, 8)), 1),
                    "ms without it": round(statistics.median(steps_ms(flux, patcher, inputs, 8)), 1),
                }
                if not recorded.facts["plan bytes"]:
                    raise SystemExit("the compiler has served no allocation: torch allocates by itself here")
                del recorded, outputs
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2])))
    else:
        with saved_model("Flux", Path(sys.argv[1] if len(sys.argv) > 1 else "/dev/shm")) as file:
            sys.exit(record_printed_by("comfy_compiler", [sys.executable, __file__, "--measure", file]))
