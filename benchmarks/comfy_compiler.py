"""On one GPU: streaming inside ComfyUI's compiler, which serves the memory of a forward from a recorded plan.

    python3 tools/host.py run benchmarks/comfy_compiler.py [FOLDER]

Needs comfy-aimdo 0.5 or later. Models run forwards as ComfyUI 0.34 and later run those that it compiles: recorded the
first time, repeated from then on. In the INT8 model of `reading.py` each block is a scope of its own, at whose end all
is free that was allocated in it, as ComfyUI has it for MiniMax-H3; the Flux-sized model, whose blocks give new tensors
to each other, is one scope. The output is compared with that of the resident model without the compiler, and the breaks
of each forward's recording are counted. Resident and streamed forwards are timed with the compiler and without it.
FOLDER (default /dev/shm) needs room for 30 GiB.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import reading
from harness import saved_model, start_comfyui, step, steps_ms, warmed_up
from record import printed_by, write_results

NUM_FORWARDS = 8
PERCENT_ON_CPU = {"Flux": (0, 50), "MiniMax-H3, INT8": (0, 100)}


class Flux:
    """`scopes` are the modules before which a new scope begins, and the one before which none does any more."""

    def __init__(self) -> None:
        import models

        self.inputs = models.FLUX.inputs("1024 px")

    def step(self, patcher: Any, inputs: Any) -> Any:
        return patcher.model.apply_model(**inputs)

    def scopes(self, patcher: Any) -> tuple[Any, Any]:
        return (), None


class MiniMax(reading.Model):
    def __init__(self) -> None:
        self.inputs = reading.inputs()

    def scopes(self, patcher: Any) -> tuple[Any, Any]:
        module = patcher.model.diffusion_model
        return module.blocks, module.final_layer


class Recorded:
    """A model whose forwards are recorded and repeated."""

    def __init__(self, model: Any, like: Any) -> None:
        self._model, self._like = model, like
        self.graph: Any = None
        """comfy-aimdo's, from the first forward on."""
        self.breaks: list[int] = []
        """Of each forward."""

    def step(self, patcher: Any, inputs: Any) -> Any:
        import comfy_aimdo.malloc_graph
        import torch

        breaks = 0

        def enter(name: str | None) -> Any:
            def hook(*_arguments: Any) -> None:
                nonlocal breaks
                breaks += bool(self.graph.iterate(name))

            return hook

        blocks, last = self._model.scopes(patcher)
        hooks = [block.register_forward_pre_hook(enter("block")) for block in blocks]
        if last is not None:
            hooks.append(last.register_forward_pre_hook(enter(None)))
        result = torch.empty_like(self._like)  # what outlives a forward is allocated before it
        try:
            if self.graph is None:
                self.graph = comfy_aimdo.malloc_graph.record(torch.cuda.current_stream())
            else:
                self.graph.push()
            output = self._model.step(patcher, inputs)
            result.copy_(output)
            del output
            breaks += bool(self.graph.pop())
        finally:
            for hook in hooks:
                hook.remove()
        self.breaks.append(breaks)
        return result

    @property
    def facts(self) -> dict[str, int]:
        """Bytes of the plan, and allocations that did not fit it, as the compiler counts them."""
        graph = self.graph
        return {
            "plan bytes": graph.physical_bytes,
            "peak bytes": graph.peak_used,
            "allocations outside the plan": graph.rogue_count,
        }


def measure(name: str, path: str) -> None:
    """Prints what it has so far, as a JSON object, after each part of the model on the CPU."""
    start_comfyui(dynamic_vram=True)
    import torch

    from distorch2.loading import load_checkpoint
    from distorch2.planning.plan import GIB, ComponentRequest, VirtualVram

    torch.set_grad_enabled(False)
    model: Any = Flux() if name == "Flux" else MiniMax()
    found: dict[str, Any] = {}
    expected = None
    for percent in PERCENT_ON_CPU[name]:
        with torch.inference_mode():
            gib = Path(path).stat().st_size / GIB * percent / 100
            request = ComponentRequest("cuda:0", VirtualVram(gib, "cpu"), pack_weights="off")
            patcher = load_checkpoint(path, request, request, "cuda:0")[0]
            patcher.patch_model()
            if expected is None:
                expected = warmed_up(model, patcher, model.inputs)
            recorded = Recorded(model, expected)
            outputs = [step(recorded, patcher, model.inputs) for _ in range(NUM_FORWARDS)]
            found[f"{percent}% on the CPU"] = {
                "bit-identical": all(torch.equal(output, expected) for output in outputs),
                "streamed groups": sum(group.is_streamed for group in patcher.distribution.plan.groups),
                "layers only read": len(patcher.distribution.reading.only_read),
                "breaks by forward": recorded.breaks[:],
                **recorded.facts,
                "ms with it": round(statistics.median(steps_ms(recorded, patcher, model.inputs, 8)), 1),
                "ms without it": round(statistics.median(steps_ms(model, patcher, model.inputs, 8)), 1),
            }
            if not recorded.facts["peak bytes"]:
                raise SystemExit("the compiler has served no allocation: torch allocates by itself here")
            del recorded, outputs, patcher
        print(json.dumps(found), flush=True)


def main(folder: Path) -> None:
    results: dict[str, Any] = {}

    def measured(name: str, path: Path) -> None:
        for printed in printed_by([sys.executable, __file__, "--measure", name, path]):
            results[name] = printed
            write_results("comfy_compiler", results)

    with reading.saved(folder) as file:
        measured("MiniMax-H3, INT8", file)
    with saved_model("Flux", folder) as file:
        measured("Flux", file)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], sys.argv[3])
    else:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "/dev/shm"))
