"""Send a workflow in API format to a running ComfyUI, wait for it, and save its pictures. Needs nothing but Python.

python3 run.py one_small_card.json --set 1.ckpt_name=model.safetensors --set 1.unet_virtual_vram_gb=6
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

_PAUSE_S = 0.5


def change(prompt: dict[str, Any], changes: list[str]) -> None:
    """Change inputs: each change is `NODE.INPUT=VALUE`, with the node's number.

    Raises `SystemExit` for another form, and for an input that is not there.
    """
    for each in changes:
        name, is_given, text = each.partition("=")
        node, _, field = name.partition(".")
        if not is_given or field not in prompt.get(node, {}).get("inputs", {}):
            inputs = [f"{number}.{input_name}" for number, found in prompt.items() for input_name in found["inputs"]]
            raise SystemExit(f"{each!r} changes nothing here; use NODE.INPUT=VALUE, with one of {', '.join(inputs)}")
        try:
            prompt[node]["inputs"][field] = json.loads(text)
        except ValueError:
            prompt[node]["inputs"][field] = text


def run(server: str, prompt: dict[str, Any]) -> dict[str, Any]:
    """What ComfyUI has in its history of the prompt, once it is done. Raises `SystemExit` if it is refused or fails."""
    request = urllib.request.Request(f"{server}/prompt", json.dumps({"prompt": prompt}).encode())
    try:
        prompt_id = json.load(urllib.request.urlopen(request))["prompt_id"]
    except urllib.error.HTTPError as error:
        raise SystemExit(f"ComfyUI refuses the workflow:\n{json.dumps(json.load(error), indent=2)}") from error
    while not (history := json.load(urllib.request.urlopen(f"{server}/history/{prompt_id}"))):
        time.sleep(_PAUSE_S)
    found = history[prompt_id]
    for event, data in found["status"]["messages"]:
        if event == "execution_error":
            raise SystemExit(f"{data['node_type']} failed: {data['exception_message']}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workflow", type=Path, help="a file of this folder, or any workflow in API format")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="may be given repeatedly"
    )
    parser.add_argument("--server", default="http://127.0.0.1:8188")
    parser.add_argument("--output", type=Path, default=Path("."), help="a folder for the pictures")
    given = parser.parse_args()
    prompt = json.loads(given.workflow.read_text())
    change(prompt, given.set)
    outputs = run(given.server, prompt)["outputs"]
    for output in outputs.values():
        for table in output.get("distorch2_placement", []):  # what lies where; absent if the model was loaded before
            print(table)
        for image in output.get("images", []):
            path = given.output / image["filename"]
            with urllib.request.urlopen(f"{given.server}/view?{urllib.parse.urlencode(image)}") as picture:
                path.write_bytes(picture.read())
            print(path)


if __name__ == "__main__":
    main()
