"""Make the example workflows in UI format and every picture, with the real front end.

    python3 tools/host.py run tools/make_examples.py

The API format in `example_workflows/api/` is what is written by hand. From it come the UI format with a layout and a
note, a picture of that, and the API format once more, as the front end exports it. The pictures of the README are of
`two_cards_by_ratio`, run and refused on this machine.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import uuid
from pathlib import Path

import torch
from browser import FrontEnd, chromium
from checkpoints import ensure_checkpoint
from comfy_server import ROOT, ComfyServer
from PIL import Image
from workflows import EXAMPLES, Prompt, example, replace_missing_devices, with_small_image

IMAGES = ROOT / "docs" / "images"
LOADER, NOTE = "1", "8"
# Node id -> x, y, width, height of its body, with room for the image and, below the loader, for the table of a run.
LAYOUT = {
    LOADER: (0, 0, 390, 362),
    "2": (440, 0, 260, 120),
    "3": (440, 180, 260, 100),
    "4": (440, 340, 260, 106),
    "5": (750, 0, 260, 262),
    "6": (1060, 0, 250, 46),
    "7": (1060, 106, 250, 424),
    NOTE: (750, 360, 260, 170),
}
LAYOUT_AT_ONCE = {
    **LAYOUT,
    "9": (440, 506, 260, 58),
}
LAYOUT_OF_SEPARATE_FILES = {
    LOADER: (0, 0, 390, 206),
    "9": (0, 276, 390, 106),
    "10": (0, 452, 390, 206),
    "11": (750, 600, 260, 58),
    "12": (440, 0, 260, 58),
    "2": (440, 128, 260, 120),
    "3": (440, 318, 260, 100),
    "4": (440, 488, 260, 106),
    "5": (750, 0, 260, 262),
    "6": (1060, 0, 250, 46),
    "7": (1060, 106, 250, 424),
    NOTE: (750, 332, 260, 200),
}
LAYOUTS = {
    "separate_files": LAYOUT_OF_SEPARATE_FILES,
    "gguf": LAYOUT_OF_SEPARATE_FILES,
    "two_cards_at_once": LAYOUT_AT_ONCE,
}
# Without code spans: in Nodes 2.0 a note shows them in blue on grey, which nobody can read.
NOTES = {
    "one_small_card": """## One small card
**unet_virtual_vram_gb** is how much of the diffusion model stays in main memory, and comes to the card when it is \
needed. The text encoder computes on the CPU: for a large one (T5-XXL, Qwen) choose the card.

**To change:** the checkpoint; more GB when the card runs out of memory, fewer for speed.""",
    "two_cards_by_ratio": """## Two cards, by ratio
**cuda:0** keeps 70% of the diffusion model; **cuda:1** has the last 30%, whose blocks it runs itself, and the whole \
text encoder.

**To change:** the checkpoint; the ratio; a third device, as in **cuda:0,60%;cuda:1,20%;cpu,20%**.""",
    "two_cards_at_once": """## Two cards at once
For guidance (CFG above 1): **MultiGPU CFG Split** has each card run the whole model for one of the two prompts. Each \
keeps **50%** of the diffusion model; what they lack lies once in main memory, and is copied to both. If the cards \
wait long for that, the prompts go from card to card from the next run on. With CFG 1 the node does nothing, and \
**cuda:1** runs the blocks that it keeps.

**To change:** the checkpoint; the ratio, for what each card has room for.""",
    "separate_files": """## Separate files
Two ways to the same end: **Load Diffusion Model (DisTorch2)** loads and distributes; **Distribute CLIP** takes what \
any loader made, GGUF loaders too. 4 GB of the diffusion model and 2 GB of the text encoder stay in main memory.

**To change:** the files and the type of the text encoder; the shift of **ModelSamplingAuraFlow**, which is \
Qwen-Image's; more GB when the card runs out of memory.""",
    "gguf": """## GGUF
**Unet Loader (GGUF) (DisTorch2)** loads with ComfyUI-GGUF, which has to be installed. The card keeps **8gb** of the \
file as it is; **cpu,\\*** takes what remains, and is copied ahead in each step. The text encoder may be a GGUF file \
as well: put **CLIPLoader (GGUF)** before **Distribute CLIP**.

**To change:** the files and the type of the text encoder; the shift of **ModelSamplingAuraFlow**, which is \
Qwen-Image's; fewer GB when the card runs out of memory.""",
    "automatic": """## Automatic
With **auto** the compute device keeps as much of each model as it has free; then come other cards of its kind, and \
what is left stays in main memory. The bars on the node show it before the run.

**To change:** the checkpoint; **auto;keep=3gb** leaves 3 GB of each card free, for larger images and videos.""",
    "exact_bytes": """## Exact bytes
The card keeps **6gb** of the diffusion model and **2gb** of the text encoder. **cpu,\\*** takes whatever remains.

**To change:** the checkpoint; the amounts (b, kb, mb, gb or tb), so that the image has room beside them.""",
}
SEPARATE_FILES = {
    "diffusion_models": "diffusion_model.safetensors",
    "text_encoders": "text_encoder.safetensors",
    "vae": "vae.safetensors",
}
MARGIN = 24
PREVIEWS = "**/distorch2/preview*"

_LAY_OUT = """([layout, noteId, title, text, loaderId, isExpert]) => {
    const note = LiteGraph.createNode("MarkdownNote");
    note.id = Number(noteId);
    note.title = title;
    note.widgets[0].value = text;
    app.graph.add(note);
    for (const [id, [x, y, width, height]] of Object.entries(layout)) {
        const node = app.graph.getNodeById(id);
        node.pos = [x, y];
        node.setSize([width, height]);
    }
    for (const node of app.graph.nodes)
        for (const widget of node.widgets ?? [])
            if (widget.name === "control_after_generate") widget.value = "fixed";
    if (isExpert) app.graph.getNodeById(loaderId).showAdvanced = true;
}"""


def make_example(front_end: FrontEnd, name: str) -> None:
    """Write the UI format, the API format as the front end exports it, and the picture of one example."""
    _open_with_layout(front_end, example(name), name)
    workflow = front_end.save()
    workflow["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, name))  # the same every time
    workflow["extra"].pop("ds", None)  # where the canvas happened to be
    _write_json(EXAMPLES / f"{name}.json", workflow)
    _write_json(EXAMPLES / "api" / f"{name}.json", front_end.export())

    front_end.load(workflow, name)
    front_end.show(LOADER)
    _take_picture(front_end, EXAMPLES / f"{name}.jpg", 800)


def make_readme_pictures(front_end: FrontEnd, server: ComfyServer, compute_device: str, donor: str) -> None:
    """Write a picture of the loader after a run, and one of the error that a bad string gives."""
    name = "two_cards_by_ratio"
    prompt, _ = replace_missing_devices(example(name), server.get("/object_info"), compute_device, donor)
    prompt[LOADER]["inputs"]["clip_expert_mode_allocations"] = f"{compute_device},*;{donor},100mb"
    _open_with_layout(front_end, with_small_image(prompt, 64, 2), name)
    front_end.show(LOADER)
    _, answer = front_end.queue()
    server.output_files(server.wait(answer["prompt_id"]))
    front_end.page.locator("pre", has_text="DisTorch2: ").wait_for()
    front_end.page.locator(".distorch2-preview", has_text="streamed").wait_for()
    _take_picture(front_end, IMAGES / "placement.jpg", 480, front_end.rectangle([LOADER]))

    front_end.set_widget(LOADER, "unet_expert_mode_allocations", f"{compute_device},2tib;{donor},*")
    front_end.page.locator(".distorch2-preview", has_text="unknown unit").wait_for()
    front_end.queue()
    front_end.open_error("unet_expert_mode_allocations")
    panel = front_end.page.get_by_test_id("properties-panel").bounding_box()
    node = front_end.rectangle([LOADER])
    front_end.show(LOADER, panel["x"] - node["width"] - 60, 185)  # below the tabs of the panel
    node = front_end.rectangle([LOADER])
    width = panel["x"] + panel["width"] - node["x"] - MARGIN  # up to the right edge of the page
    clip = {"x": node["x"], "y": node["y"], "width": width, "height": node["height"]}
    _take_picture(front_end, IMAGES / "error.jpg", 720, clip)


def _open_with_layout(front_end: FrontEnd, prompt: Prompt, name: str) -> None:
    is_expert = bool(prompt[LOADER]["inputs"].get("unet_expert_mode_allocations"))
    layout = LAYOUTS.get(name, LAYOUT)
    front_end.load_api(prompt, name)
    front_end.page.evaluate(_LAY_OUT, [layout, NOTE, "Read me", NOTES[name], LOADER, is_expert])


def _take_picture(front_end: FrontEnd, path: Path, width: int, clip: dict[str, float] | None = None) -> None:
    """Write a picture of a part of the page (of all nodes, when None), with a margin."""
    clip = clip or front_end.rectangle()
    clip = {
        "x": clip["x"] - MARGIN,
        "y": clip["y"] - MARGIN,
        "width": clip["width"] + 2 * MARGIN,
        "height": clip["height"] + 2 * MARGIN,
    }
    with Image.open(io.BytesIO(front_end.page.screenshot(clip=clip))) as picture:
        size = width, round(picture.height * width / picture.width)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(path, quality=88, optimize=True)
    print(f"{path.relative_to(ROOT)}: {size[0]}x{size[1]} px, {path.stat().st_size / 1000:.0f} kB")


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    has_accelerator = torch.cuda.is_available()
    compute_device, donor = ("cuda:0", "cpu") if has_accelerator else ("cpu", "sim:0")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        models = base / "models" / "checkpoints"
        models.mkdir(parents=True)
        checkpoint = ensure_checkpoint("sd3", ROOT / ".host" / "checkpoints")
        (models / example("exact_bytes")[LOADER]["inputs"]["ckpt_name"]).symlink_to(checkpoint)
        for folder, name in SEPARATE_FILES.items():
            (base / "models" / folder).mkdir()
            (base / "models" / folder / name).symlink_to(checkpoint)
        (base / "models" / "diffusion_models" / "diffusion_model.gguf").touch()  # it is listed, and not read
        (base / "custom_nodes").mkdir()
        (base / "custom_nodes" / "gguf_pack").symlink_to(ROOT / "tests" / "gguf_pack")
        if not has_accelerator:
            (base / "custom_nodes" / "simulated").symlink_to(ROOT / "tests" / "simulated_accelerators")
        arguments = () if has_accelerator else ("--cpu",)
        server = ComfyServer(Path(os.environ["COMFYUI_PATH"]), base, arguments, pack_folder="distorch2")
        with server, chromium() as browser:
            front_end = FrontEnd(browser, server, width=1500, height=1000, pixels_per_point=2)
            # This machine may lack the devices of the examples, of which the previews would be about that.
            front_end.page.route(PREVIEWS, lambda route: route.abort())
            for name in NOTES:
                make_example(front_end, name)
            front_end.page.unroute(PREVIEWS)
            make_readme_pictures(front_end, server, compute_device, donor)


if __name__ == "__main__":
    main()
