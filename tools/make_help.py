"""Write the help pages of the nodes in `drop_in_nodes.py`, of the same table as the nodes.

python3 tools/host.py run tools/make_help.py
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "web" / "docs"
_FOOTER = """
Saved workflows of ComfyUI-MultiGPU open with this node: it has the name and the inputs of one there. What allocation
strings can say is in the help of *Load Checkpoint (DisTorch2)*.
"""


def help_page(node: Any) -> str:
    """In Markdown."""
    loader = getattr(node, "LOADER", None)
    if loader is None:
        inputs = {name: each for of_kind in node.INPUT_TYPES().values() for name, each in of_kind.items()}
        text = ""
    else:
        inputs = node.own_inputs()
        text = f"It takes what *{loader.name}* takes, and:\n\n"
    lines = [f"- `{name}`: {options['tooltip']}" for name, (_, options) in inputs.items()]
    return f"# {node.TITLE}\n\n{node.DESCRIPTION}\n\n## Inputs\n\n{text}" + "\n".join(lines) + f"\n{_FOOTER}"


def pack() -> ModuleType:
    """The pack, imported as ComfyUI imports it."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    spec = importlib.util.spec_from_file_location("the_pack", ROOT / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["the_pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    for node in pack().drop_in_nodes.all_nodes():
        page = PAGES / node.__name__ / "en.md"
        page.parent.mkdir(exist_ok=True)
        page.write_text(help_page(node))
        print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
