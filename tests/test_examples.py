"""The files that the front end shows: the examples with their pictures, and the help page."""

import itertools
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image
from workflows import EXAMPLES, NODE_ID, example

from allocation_parser import parse_allocation

pytestmark = pytest.mark.quick

NAMES = sorted(path.stem for path in (EXAMPLES / "api").glob("*.json"))
HELP = ROOT / "web" / "docs" / NODE_ID / "en.md"
TITLE_HEIGHT = 30


def workflow(name):
    """The UI format of an example."""
    return json.loads((EXAMPLES / f"{name}.json").read_text())


def test_every_example_is_there_in_both_formats_and_as_a_picture():
    assert NAMES == [
        "automatic",
        "exact_bytes",
        "gguf",
        "one_small_card",
        "separate_files",
        "two_cards_at_once",
        "two_cards_by_ratio",
    ]
    assert sorted(path.name for path in EXAMPLES.iterdir() if path.is_file()) == sorted(
        f"{name}.{kind}" for name in NAMES for kind in ("json", "jpg")
    )


@pytest.mark.parametrize("picture", [*EXAMPLES.glob("*.jpg"), *ROOT.glob("docs/images/*")], ids=lambda path: path.name)
def test_pictures_are_small_and_of_a_readable_size(picture):
    assert picture.stat().st_size < 150_000
    with Image.open(picture) as image:
        assert image.format == "JPEG"
        assert 400 < image.width <= 900


@pytest.mark.parametrize("name", NAMES)
def test_an_example_has_one_note_and_no_node_covers_another(name):
    nodes = workflow(name)["nodes"]
    (note,) = (node for node in nodes if node["type"] == "MarkdownNote")
    assert "**To change:**" in note["widgets_values"][0]
    for first, second in itertools.combinations(nodes, 2):
        apart = [
            first["pos"][axis] + first["size"][axis] + title <= second["pos"][axis]
            or second["pos"][axis] + second["size"][axis] + title <= first["pos"][axis]
            for axis, title in ((0, 0), (1, TITLE_HEIGHT))
        ]
        assert any(apart), (first["id"], second["id"])


def test_what_each_example_shows():
    of_files = {"separate_files": "UNETLoaderDisTorch2MultiGPU", "gguf": "UnetLoaderGGUFDisTorch2MultiGPU"}
    for name, loader in of_files.items():
        files = [node["class_type"] for node in example(name).values() if "Load" in node["class_type"]]
        assert files == [loader, "CLIPLoader", "VAELoader"]
    assert example("gguf")["1"]["inputs"]["expert_mode_allocations"] == "cuda:0,8gb;cpu,*"
    widgets = {name: example(name)["1"]["inputs"] for name in NAMES if name not in of_files}
    assert widgets["one_small_card"]["unet_virtual_vram_gb"] == 4
    expert = {name: inputs["unet_expert_mode_allocations"] for name, inputs in widgets.items()}
    assert expert == {
        "one_small_card": "",
        "two_cards_at_once": "cuda:0,50%;cuda:1,50%",
        "two_cards_by_ratio": "cuda:0,70%;cuda:1,30%",
        "automatic": "auto",
        "exact_bytes": "cuda:0,6gb;cpu,*",
    }


@pytest.mark.parametrize("text", ["help", "note"])
def test_allocation_strings_in_the_help_and_the_notes_are_accepted(text):
    if text == "help":
        found = re.findall(r"^- `(\w+(?::\d)?,[^`]+)`", HELP.read_text(), re.MULTILINE)
    else:
        notes = (node["widgets_values"][0] for name in NAMES for node in workflow(name)["nodes"] if node["id"] == 8)
        found = re.findall(r"\*\*(\w+:\d,[^ ]+)\*\*", "".join(notes))
    assert len(found) == {"help": 9, "note": 1}[text]
    for allocation in found:
        parse_allocation(allocation)


def test_the_help_pages_that_are_made_of_a_table_are_up_to_date():
    """Else `make help-pages` was forgotten."""
    made = subprocess.run([sys.executable, ROOT / "tools" / "make_help.py", "--check"], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr


def test_the_help_page_names_every_input_and_output():
    (listed,) = re.findall(r"^## Inputs$.*?^## Allocation strings$", HELP.read_text(), re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"(?:^- |, )`(\w+)`(?: \(|:|,)", listed, re.MULTILINE))
    assert {*example("exact_bytes")["1"]["inputs"], "MODEL", "CLIP", "VAE"} == named
