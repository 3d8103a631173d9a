"""Write the help pages of the nodes in `drop_in_nodes.py`, of the same table as the nodes.

    python3 tools/host.py run tools/make_help.py [--check]

With --check nothing is written, and the exit status is 1 where a page says something else.
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
_MADE = "<!-- made by tools/make_help.py -->"
_FOOTER = "ComfyUI-MultiGPU has a node by this name with these inputs: its saved workflows open with this one.\n"
_ON_STRINGS = "What allocation strings can say is in the help of *Load Checkpoint (DisTorch2)*.\n"


def help_page(node: Any) -> str:
    """In Markdown."""
    loader = getattr(node, "LOADER", None)
    if loader is None:
        inputs = {name: each for of_kind in node.INPUT_TYPES().values() for name, each in of_kind.items()}
        text = ""
    else:
        inputs = node.own_inputs()
        text = "It has the inputs of that loader, and:\n\n"
    lines = [f"- `{name}`: {options['tooltip']}" for name, (_, options) in inputs.items()]
    can_be_split = loader is not None and loader.is_split(node.SUFFIX)
    footer = _FOOTER + (_ON_STRINGS if can_be_split else "")
    listed = "\n".join(lines)
    return f"# {node.TITLE}\n{_MADE}\n\n{node.DESCRIPTION}\n\n## Inputs\n\n{text}{listed}\n\n{footer}"


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


def main(only_check: bool) -> int:
    pages = {PAGES / node.__name__ / "en.md": help_page(node) for node in pack().drop_in_nodes.all_nodes()}
    changed = [page for page, text in pages.items() if not page.exists() or page.read_text() != text]
    for page in changed:
        print(page.relative_to(ROOT))
        if not only_check:
            page.parent.mkdir(exist_ok=True)
            page.write_text(pages[page])
    return int(only_check and bool(changed))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
