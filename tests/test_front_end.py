"""ComfyUI's own front end on a real server, in a browser and with mouse and keyboard, in both of its renderers."""

import json
import re
import sys
from pathlib import Path

import pytest
from comfy_server import ComfyServer
from conftest import COMFYUI_PATH, NUM_ACCELERATORS, ROOT
from host import fetch_comfyui, find_browser
from PIL import Image
from serving import IS_FETCHED, VERSIONS, front_end_of, newest_front_end
from workflows import EXAMPLES, NODE_ID, example

if find_browser() is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)
pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from browser import FrontEnd, chromium

LOADER, LATENT, SAMPLER = "1", "4", "5"  # ids in the examples
NAMES = sorted(path.stem for path in (EXAMPLES / "api").glob("*.json"))
COMPUTE, DONOR = ("cuda:0", "cpu") if NUM_ACCELERATORS else ("cpu", "sim:0")
CHECKPOINT = "sd3_no_clip_weights.safetensors"
SCREENSHOTS = ROOT / ".host" / "screenshots"
PACK_FOLDER = "distorch2_under_test"  # the front end looks for the help of a folder with a dot in the wrong place
# A ComfyUI of the user's own is tested with the front end that it has.
FRONT_ENDS = ["pinned", "newest", "oldest"] if IS_FETCHED else ["pinned"]
"""The one that the default ComfyUI names; the newest one with it; the oldest supported ComfyUI with its own."""


@pytest.fixture(scope="module", params=FRONT_ENDS)
def server(request, checkpoints, tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    (base / "models" / "checkpoints").mkdir(parents=True)
    (base / "models" / "checkpoints" / CHECKPOINT).symlink_to(checkpoints("sd3_no_clip_weights"))
    (base / "models" / "text_encoders").mkdir()
    (base / "models" / "text_encoders" / "clip_l.safetensors").symlink_to(checkpoints("clip_l"))
    arguments, tree = ["--cache-none"], COMFYUI_PATH
    if request.param == "newest":
        arguments += newest_front_end()
    if request.param == "oldest":
        tree = fetch_comfyui(VERSIONS[0], Path(sys.executable))
        arguments += front_end_of(tree)
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "gguf_pack").symlink_to(ROOT / "tests" / "gguf_pack")
    if not NUM_ACCELERATORS:
        arguments.append("--cpu")
        (base / "custom_nodes" / "simulated").symlink_to(ROOT / "tests" / "simulated_accelerators")
    with ComfyServer(tree, base, tuple(arguments), pack_folder=PACK_FOLDER) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture(scope="module", params=["classic", "nodes_2"])
def front_end(request, browser, server):
    opened = FrontEnd(browser, server, nodes_2=request.param == "nodes_2")
    yield opened
    opened.page.close()


@pytest.fixture(autouse=True)
def screenshot(request, server, front_end):  # `server` comes first, so that each server is started once
    yield
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "_", request.node.name).strip("_")
    front_end.page.screenshot(path=SCREENSHOTS / f"{name}.png")


def ui_file(name):
    return (EXAMPLES / f"{name}.json").read_text()


def on_this_machine(name):
    """The UI format of an example with this machine's devices and checkpoint, and nothing on donors."""
    widgets = {
        widget: COMPUTE if widget.endswith("_device") else "" if widget.endswith("_allocations") else value
        for widget, value in example(name)[LOADER]["inputs"].items()
    }
    widgets["ckpt_name"] = CHECKPOINT
    workflow = json.loads(ui_file(name))
    (loader,) = (node for node in workflow["nodes"] if node["type"] == NODE_ID)
    loader["widgets_values"] = [*widgets.values()]
    return workflow


def pixels(files):
    (image,) = files
    with Image.open(image) as opened:
        return opened.tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_the_ui_format_exports_as_the_api_format(front_end, name):
    front_end.load(json.loads(ui_file(name)), name)
    assert front_end.export() == example(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_templates_list_every_example(server, front_end, name):
    assert name in server.get("/workflow_templates")[PACK_FOLDER]
    for kind in ("json", "jpg"):
        assert front_end.page.request.get(f"{server.url}/api/workflow_templates/{PACK_FOLDER}/{name}.{kind}").ok


@pytest.mark.quick("pinned-classic")
def test_a_dropped_example_set_up_by_hand_runs_and_its_export_gives_the_same_image(server, front_end):
    front_end.drop_file("two_cards_by_ratio.json", ui_file("two_cards_by_ratio"))
    assert front_end.export() == example("two_cards_by_ratio")
    widgets = {
        "ckpt_name": CHECKPOINT,
        "unet_compute_device": COMPUTE,
        "clip_compute_device": COMPUTE,
        "vae_device": COMPUTE,
        "unet_expert_mode_allocations": f"{COMPUTE},60%;{DONOR},40%",
    }
    for name, value in widgets.items():
        front_end.set_widget(LOADER, name, value)
    for node, name, value in ((LATENT, "width", 64), (LATENT, "height", 64), (SAMPLER, "steps", 2)):
        front_end.set_widget(node, name, value)
    exported = front_end.export()
    assert {name: exported[LOADER]["inputs"][name] for name in widgets} == widgets

    status, answer = front_end.queue()
    assert status == 200
    history = server.wait(answer["prompt_id"])
    assert pixels(server.output_files(history)) == pixels(server.output_files(server.run(exported)))

    # The table on the node is that of the log.
    front_end.show(LOADER)
    table = front_end.page.locator("pre", has_text="DisTorch2: ")
    table.wait_for()
    assert re.search(rf"diffusion model +{DONOR} +streamed +[1-9]", table.inner_text())
    assert table.inner_text() in server.log
    # It is not part of the workflow.
    assert front_end.export() == exported
    assert "DisTorch2: " not in json.dumps(front_end.save())


def test_a_bad_allocation_is_shown_on_the_loader_before_anything_is_loaded(server, front_end):
    name = "unet_expert_mode_allocations"
    front_end.load(on_this_machine("exact_bytes"), "bad")
    front_end.set_widget(LOADER, name, "cpu,2tib;cpu,*")
    log_before = server.log
    status, answer = front_end.queue()
    assert status == 400
    assert [*answer["node_errors"]] == [LOADER]
    assert {error["type"] for error in answer["node_errors"][LOADER]["errors"]} == {"custom_validation_failed"}

    text = front_end.open_error(name)
    text.wait_for()
    shown = f"{name}: unknown unit 'tib'; use b, kb, mb, gb or tb\n    cpu,2tib;cpu,*\n         ~~~^"
    assert shown in text.text_content()
    assert text.evaluate("(element) => getComputedStyle(element).whiteSpace") == "pre-wrap"
    with_errors = "() => app.graph.nodes.filter((node) => node.has_errors).map((node) => String(node.id))"
    assert front_end.page.evaluate(with_errors) == [LOADER]
    assert "model weight dtype" not in server.log[len(log_before) :]


def preview_on(front_end, text):
    """The preview on the loader, once it has this text."""
    front_end.show(LOADER)
    found = front_end.page.locator(".distorch2-preview:visible", has_text=text)
    found.wait_for()
    return found


def test_the_preview_follows_the_widgets(server, front_end):
    front_end.load(on_this_machine("exact_bytes"), "preview")
    before = front_end.export()
    preview_on(front_end, f"{COMPUTE}  3.0 MiB  100%  resident")
    front_end.set_widget(LOADER, "unet_expert_mode_allocations", f"{COMPUTE},30%;{DONOR},70%")
    found = preview_on(front_end, re.compile(rf"{DONOR} .* streamed"))
    text = found.inner_text()
    assert "diffusion model  3.0 MiB" in text
    assert "each step copies" in text
    front_end.set_widget(LOADER, "unet_expert_mode_allocations", "cpu,2tib;cpu,*")
    text = preview_on(front_end, "unet_expert_mode_allocations:").inner_text()
    assert "unknown unit 'tib'; use b, kb, mb, gb or tb\n    cpu,2tib;cpu,*\n         ~~~^" in text
    front_end.set_widget(LOADER, "unet_expert_mode_allocations", "")
    preview_on(front_end, "resident")
    assert front_end.export() == before
    assert "preview" not in json.dumps(front_end.save())


def test_undo_is_about_what_was_edited_and_the_preview_follows(front_end):
    name, page = "unet_virtual_vram_gb", front_end.page
    front_end.load(on_this_machine("exact_bytes"), "undo")
    value = lambda: front_end.export()[LOADER]["inputs"][name]  # noqa: E731
    size = lambda: [node["size"] for node in front_end.save()["nodes"] if node["type"] == NODE_ID]  # noqa: E731
    preview_on(front_end, "resident")
    first_value, first_size = value(), size()
    for changed in (3.0, 2.0):
        front_end.set_widget(LOADER, name, changed)
        page.wait_for_timeout(1000)  # for the preview of this value
    track = (
        "async (what) => { const of = app.extensionManager.workflow.activeWorkflow.changeTracker; await of[what](); }"
    )
    page.evaluate(track, "checkState")  # as an event of the mouse does
    num_edits = page.evaluate("() => app.extensionManager.workflow.activeWorkflow.changeTracker.undoQueue.length")
    assert 1 <= num_edits <= 2  # Nodes 2.0 takes the two for one
    for _ in range(num_edits):
        page.evaluate(track, "undo")
        page.wait_for_timeout(1000)
    assert value() == first_value
    preview_on(front_end, "resident")
    page.evaluate(track, "redo")
    assert value() != first_value
    if not front_end.nodes_2:  # which gives nodes a height of its own, as they are drawn
        assert size() == first_size


def test_a_model_that_is_distributed_is_shown_by_the_file_of_its_loader(front_end, checkpoints):
    nodes = [
        {"id": 1, "type": "CheckpointLoaderSimple", "pos": [0, 0], "size": [300, 100], "widgets_values": [CHECKPOINT],
         "outputs": [{"name": "MODEL", "type": "MODEL", "links": [1]}]},
        {"id": 2, "type": "ModelSamplingSD3", "pos": [320, 0], "size": [200, 60], "widgets_values": [3.0],
         "inputs": [{"name": "model", "type": "MODEL", "link": 1}],
         "outputs": [{"name": "MODEL", "type": "MODEL", "links": [2]}]},
        {"id": 3, "type": "DistributeModelDisTorch2", "pos": [540, 0], "size": [300, 200],
         "inputs": [{"name": "model", "type": "MODEL", "link": 2}],
         "widgets_values": [COMPUTE, 0.002, DONOR, "", True, "auto", "auto"]},
    ]  # fmt: skip
    links = [[1, 1, 0, 2, 0, "MODEL"], [2, 2, 0, 3, 0, "MODEL"]]
    front_end.load({"version": 0.4, "nodes": nodes, "links": links}, "distributed")
    front_end.show("3")
    found = front_end.page.locator(".distorch2-preview:visible", has_text=f"{DONOR}  2.0 MiB")
    found.wait_for()
    assert found.inner_text().startswith("diffusion model  3.0 MiB")
    front_end.page.evaluate("() => { app.graph.getNodeById(1).mode = 4 }")  # bypassed: it loads nothing
    found.wait_for(state="hidden")


def test_a_text_encoder_of_a_file_of_its_own_is_shown(front_end):
    files = ["clip_l.safetensors", "sd3"]
    nodes = [
        {"id": 1, "type": "CLIPLoader", "pos": [0, 0], "size": [300, 100], "widgets_values": [*files, "default"],
         "outputs": [{"name": "CLIP", "type": "CLIP", "links": [1]}]},
        {"id": 2, "type": "DistributeCLIPDisTorch2", "pos": [0, 300], "size": [300, 200],
         "inputs": [{"name": "clip", "type": "CLIP", "link": 1}],
         "widgets_values": [COMPUTE, 0.1, DONOR, "", True, "auto", "auto"]},
        {"id": 3, "type": "CLIPLoaderDisTorch2MultiGPU", "pos": [500, 0], "size": [300, 200],
         "widgets_values": [*files, COMPUTE, 0.1, DONOR, "", False]},
        {"id": 4, "type": "CLIPVisionLoaderDisTorch2MultiGPU", "pos": [500, 500], "size": [300, 200],
         "widgets_values": ["clip_l.safetensors", COMPUTE, 0.1, DONOR, "", False]},
    ]  # fmt: skip
    front_end.load({"version": 0.4, "nodes": nodes, "links": [[1, 1, 0, 2, 0, "CLIP"]]}, "text_encoders")
    front_end.show("2", scale=0.6)
    found = front_end.page.locator(".distorch2-preview:visible", has_text=f"{DONOR}  ")
    found.nth(1).wait_for()
    assert [each.startswith("text encoder  ") for each in found.all_inner_texts()] == [True, True]


def test_the_node_shows_its_widgets_and_its_name(server, front_end):
    front_end.load(json.loads(ui_file("exact_bytes")), "exact_bytes")
    front_end.show(LOADER)
    inputs = server.get("/object_info")[NODE_ID]["input_order"]
    assert front_end.widget_names(LOADER) == [*inputs["required"], *inputs["optional"]]
    title = front_end.page.evaluate("(id) => app.graph.getNodeById(id).getTitle()", LOADER)
    assert title == "Load Checkpoint (DisTorch2)"


def test_inputs_and_outputs_have_tooltips(server, front_end):
    info = server.get("/object_info")[NODE_ID]
    front_end.load(json.loads(ui_file("exact_bytes")), "exact_bytes")
    front_end.show(LOADER)
    front_end.hover_widget(LOADER, "unet_expert_mode_allocations")
    text = info["input"]["optional"]["unet_expert_mode_allocations"][1]["tooltip"]
    front_end.tooltips.filter(has_text=text).wait_for()
    front_end.hover_output(LOADER, 0)
    front_end.tooltips.filter(has_text=info["output_tooltips"][0]).wait_for()


def test_the_node_is_found_by_what_people_look_for(front_end):
    front_end.load(json.loads(ui_file("exact_bytes")), "exact_bytes")
    results = front_end.search("virtual vram")
    for name in ("Load Checkpoint (DisTorch2)", "Distribute Model (DisTorch2)"):
        results.filter(has_text=name).wait_for()
    front_end.page.keyboard.press("Escape")


def test_the_help_page_opens_from_the_node(front_end):
    front_end.load(json.loads(ui_file("exact_bytes")), "exact_bytes")
    page = front_end.open_help(LOADER)
    page.get_by_role("heading", name="Allocation strings").wait_for()
    assert "unknown unit 'tib'; use b, kb, mb, gb or tb\n    cuda:0,2tib" in page.inner_text()


SAVED = {
    "UNETLoaderDisTorch2MultiGPU": {
        "unet_name": "wan.safetensors",
        "weight_dtype": "default",
        "compute_device": "cuda:0",
        "virtual_vram_gb": 9,
        "donor_device": "cuda:1",
        "expert_mode_allocations": "cuda:0,50%;cpu,*",
        "eject_models": True,
    },
    "UNETLoaderMultiGPU": {"unet_name": "flux.safetensors", "weight_dtype": "fp8_e4m3fn", "device": "cuda:1"},
    "CLIPLoaderDisTorch2MultiGPU": {
        "clip_name": "umt5.safetensors",
        "type": "wan",
        "device": "cuda:1",
        "virtual_vram_gb": 3.9,
        "donor_device": "cpu",
        "expert_mode_allocations": "",
        "eject_models": False,
    },
    "DualCLIPLoaderMultiGPU": {
        "clip_name1": "t5xxl.safetensors",
        "clip_name2": "clip_l.safetensors",
        "type": "flux",
        "device": "cpu",
    },
    "VAELoaderMultiGPU": {"vae_name": "ae.safetensors", "device": "cuda:1"},
    "CheckpointLoaderSimpleDisTorch2MultiGPU": {
        "ckpt_name": "ltx.safetensors",
        "compute_device": "cuda:0",
        "virtual_vram_gb": 5,
        "donor_device": "cuda:1",
        "expert_mode_allocations": "",
        "eject_models": True,
    },
    "CheckpointLoaderAdvancedMultiGPU": {
        "ckpt_name": "sdxl.safetensors",
        "unet_device": "cuda:0",
        "clip_device": "cpu",
        "vae_device": "cuda:1",
    },
}
"""Nodes as workflows of ComfyUI-MultiGPU have them, in the order of their widgets, on a machine with other devices."""


def test_saved_nodes_of_the_other_pack_open_and_export_with_their_values(front_end):
    nodes = [
        {"id": i, "type": node, "pos": [400 * i, 0], "size": [300, 200], "widgets_values": [*widgets.values()]}
        for i, (node, widgets) in enumerate(SAVED.items(), 1)
    ]
    front_end.load({"version": 0.4, "nodes": nodes, "links": []}, "saved")
    found = {node["class_type"]: node["inputs"] for node in front_end.export().values()}
    assert found == SAVED


def test_no_complaint_in_the_console_is_about_this_pack(front_end):
    # About a node with an error the front end asks a server elsewhere, by name, which this one forbids it.
    ours = [text for text in front_end.complaints if re.search("distorch|multigpu", text, re.IGNORECASE)]
    expected = r"Content Security Policy|status 400: .*/distorch2/preview\?"  # the second, while a mistake is typed
    assert [text for text in ours if not re.search(expected, text)] == []
