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
_TRUTH = {"true": True, "false": False}
_ENDED_BADLY = {"execution_error": "failed", "execution_interrupted": "was interrupted"}

Prompt = dict[str, Any]


def read_workflow(path: Path) -> Prompt:
    """Raises `SystemExit` for a file that is missing, or in another format."""
    try:
        prompt = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"cannot read {path} ({error})") from error
    if not isinstance(prompt, dict) or not all(isinstance(node, dict) and "inputs" in node for node in prompt.values()):
        raise SystemExit(f"{path} is not in API format; use the file of that name in api/, or ComfyUI's Export (API)")
    return prompt


def change(prompt: Prompt, changes: list[str]) -> None:
    """Change inputs: each change is `NODE.INPUT=VALUE`, with the node's number, and a value of the kind that is there.

    Raises `SystemExit` for another form, for an input that is not there or linked to a node, and for another kind.
    """
    for each in changes:
        name, is_given, text = each.partition("=")
        node, _, field = name.partition(".")
        inputs = prompt.get(node, {}).get("inputs", {})
        if not is_given or field not in inputs or isinstance(inputs[field], list):
            known = [
                f"{number}.{input_name}"
                for number, found in prompt.items()
                for input_name, value in found["inputs"].items()
                if not isinstance(value, list)
            ]
            raise SystemExit(f"{each!r} changes nothing here; use NODE.INPUT=VALUE, with one of {', '.join(known)}")
        try:
            inputs[field] = _like(inputs[field], text)
        except (KeyError, ValueError) as error:
            raise SystemExit(f"{name} is {text!r}; use a value like {json.dumps(inputs[field])}") from error


def _like(present: Any, text: str) -> Any:
    """`text` as a value of the same kind. Raises `KeyError` or `ValueError` where it is none."""
    if isinstance(present, bool):
        return _TRUTH[text.lower()]
    if isinstance(present, (int, float)):
        return float(text) if "." in text or "e" in text.lower() else int(text)
    return text


def run(server: str, prompt: Prompt) -> Prompt:
    """The outputs of the nodes, when ComfyUI is done. Raises `SystemExit` if it refuses the workflow or does not finish
    it."""
    prompt_id = json.loads(_answer(f"{server}/prompt", json.dumps({"prompt": prompt}).encode()))["prompt_id"]
    is_waiting = True
    while not (history := json.loads(_answer(f"{server}/history/{prompt_id}"))):
        if not is_waiting:
            raise SystemExit("ComfyUI has no such workflow any more: its queue was cleared, or it was started again")
        is_waiting = prompt_id.encode() in _answer(f"{server}/queue")
        time.sleep(_PAUSE_S)
    found = history[prompt_id]
    for event, data in found["status"]["messages"]:
        if event in _ENDED_BADLY:
            raise SystemExit(
                f"{data['node_type']} {_ENDED_BADLY[event]}: {data.get('exception_message', '')}".rstrip(": ")
            )
    return found["outputs"]


def _answer(url: str, data: bytes | None = None) -> bytes:
    """Raises `SystemExit` where there is none."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data)) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        raise SystemExit(f"ComfyUI refuses {url}: {_reasons(error)}") from error
    except (OSError, ValueError) as error:  # ValueError: no address
        raise SystemExit(f"no answer from {url} ({error}): does ComfyUI run there? See --server") from error


def _reasons(error: urllib.error.HTTPError) -> str:
    """What ComfyUI says of each node, as far as it says anything."""
    try:
        answer = json.loads(error.read())
        details = [
            f"{number}, {found['class_type']}: {each['message']}: {each['details']}"
            for number, found in answer["node_errors"].items()
            for each in found["errors"]
        ]
        return "\n".join([answer["error"]["message"], *details])
    except (ValueError, KeyError, TypeError):
        return str(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workflow", type=Path, help="a file of this folder, or any workflow in API format")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="an input to change; may be repeated"
    )
    parser.add_argument("--server", default="http://127.0.0.1:8188", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("."), help="a folder for the pictures (default: this one)")
    given = parser.parse_args()
    prompt, server = read_workflow(given.workflow), given.server.rstrip("/")
    change(prompt, given.set)
    given.output.mkdir(parents=True, exist_ok=True)
    for output in run(server, prompt).values():
        for table in output.get("distorch2_placement", []):  # what lies where; absent if the model was loaded before
            print(table)
        for image in output.get("images", []):
            path = given.output / image["filename"]
            path.write_bytes(_answer(f"{server}/view?{urllib.parse.urlencode(image)}"))
            print(path)


if __name__ == "__main__":
    main()
