"""Import the pack and load a checkpoint in a fresh process; print what of ComfyUI, or of the process, changed.

    python tests/comfyui_snapshot.py CHECKPOINT [DOTTED_NAME ...]

Functions of ComfyUI that are named are replaced after the import, to show that this is found. Prints one JSON object:
`compared` is the number of objects compared, `changed` names those that are not the same as before.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pkgutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMFYUI_PATH = Path(os.environ["COMFYUI_PATH"]).resolve()


def snapshot() -> dict[str, object]:
    """Every function and class of every loaded module of ComfyUI, and every attribute of these classes."""
    found = {}
    for module_name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is None or COMFYUI_PATH not in Path(file).resolve().parents:
            continue
        for name, value in list(vars(module).items()):
            if callable(value):
                found[f"{module_name}.{name}"] = value
            if isinstance(value, type) and value.__module__ == module_name:
                found.update({f"{module_name}.{name}.{key}": item for key, item in list(vars(value).items())})
    return found


def changes(before: dict[str, object]) -> list[str]:
    after = snapshot()
    return [name for name, value in before.items() if after.get(name) is not value]


def main(checkpoint: str, *plants: str) -> None:
    sys.path.insert(0, str(COMFYUI_PATH))
    import comfy.cli_args
    import torch

    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    import comfy.model_management
    import comfy.sd
    import server  # noqa: F401

    import nodes  # noqa: F401

    accelerator_before = torch.cuda.is_initialized(), torch.cuda.memory_allocated()  # ComfyUI itself initialises it
    before, modules_before = snapshot(), set(sys.modules)

    spec = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules["pack"] = pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    imported = sorted({name.partition(".")[0] for name in set(sys.modules) - modules_before})
    touched = (torch.cuda.is_initialized(), torch.cuda.memory_allocated()) != accelerator_before
    changed_by_import = changes(before)

    for plant in plants:
        owner, _, name = plant.rpartition(".")
        setattr(pkgutil.resolve_name(owner), name, lambda *_, **__: None)

    import folder_paths

    folder_paths.add_model_folder_path("checkpoints", str(Path(checkpoint).parent))
    node = pack.NODE_CLASS_MAPPINGS["CheckpointLoaderAdvancedDisTorch2MultiGPU"]
    inputs = [item for item in node.define_schema().inputs if item.id != "ckpt_name"]
    values = {item.id: 0.0 if item.id.endswith("_gb") else item.default for item in inputs}
    with torch.inference_mode():
        prepared = node.PREPARE_CLASS_CLONE(None)
        model, clip, vae = prepared.execute(ckpt_name=Path(checkpoint).name, **values).result
        comfy.model_management.load_models_gpu([model, clip.patcher, vae.patcher])
    print(
        json.dumps(
            {
                "compared": len(before),
                "changed_by_import": changed_by_import,
                "changed": changes(before),
                "imported": imported,
                "accelerator_touched_by_import": touched,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
