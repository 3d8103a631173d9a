"""Write the help pages of the nodes in `drop_in_nodes.py`, of the same table as the nodes, in three languages, and
their names and tooltips in `locales/`.

    python3 tools/host.py run tools/make_help.py [--check]

With --check nothing is written, and the exit status is 1 where a file says something else.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES, LOCALES = ROOT / "web" / "docs", ROOT / "locales"
OTHER_LANGUAGES: dict[str, dict[str, dict[str, str]]] = json.loads((ROOT / "tools" / "help_texts.json").read_text())
"""By language: titles of loaders, labels that are added to them, and other texts, by the English ones. No native
speaker has read them."""
LANGUAGES = ("en", *OTHER_LANGUAGES)
_MADE = "<!-- made by tools/make_help.py -->"
_FOOTER = "ComfyUI-MultiGPU has a node by this name with these inputs: its saved workflows open with this one."
_ON_STRINGS = "What allocation strings can say is in the help of *Load Checkpoint (DisTorch2)*."


class Texts:
    """What is said of a node, in one language."""

    def __init__(self, node: Any, locale: str) -> None:
        self._node, self._loader = node, getattr(node, "LOADER", None)
        self._translated = OTHER_LANGUAGES.get(locale)

    def say(self, text: str, kind: str = "texts") -> str:
        return text if self._translated is None else self._translated[kind][text]

    @property
    def _title_of_loader(self) -> str:
        return self.say(self._node.TITLE if self._loader is None else self._loader.title, "titles")

    @property
    def title(self) -> str:
        if self._loader is None:
            return self._title_of_loader
        label = self._node.TITLE.removeprefix(f"{self._loader.title} (").removesuffix(")")
        return f"{self._title_of_loader} ({self.say(label, 'labels')})"

    @property
    def description(self) -> str:
        if self._loader is None:
            return self.say(self._node.DESCRIPTION)
        first, stop, second = self._node.DESCRIPTION.replace(self._loader.title, "{title}", 1).partition(". ")
        sentences = [f"{first}.", f" {second}"] if stop else [first]
        return "".join(map(self.say, sentences)).format(title=self._title_of_loader)

    @property
    def inputs(self) -> dict[str, str]:
        """Name -> tooltip, of those that are not the loader's own."""
        if self._loader is None:
            inputs = {name: each for of_kind in self._node.INPUT_TYPES().values() for name, each in of_kind.items()}
        else:
            inputs = self._node.own_inputs()
        return {name: self.say(options["tooltip"]) for name, (_, options) in inputs.items()}

    def page(self) -> str:
        """In Markdown."""
        text = "" if self._loader is None else f"{self.say('It has the inputs of that loader, and:')}\n\n"
        colon = self.say(": ")
        listed = "\n".join(f"- `{name}`{colon}{tooltip}" for name, tooltip in self.inputs.items())
        can_be_split = self._loader is not None and self._loader.is_split(self._node.SUFFIX)
        footer = "\n".join(map(self.say, [_FOOTER, _ON_STRINGS] if can_be_split else [_FOOTER]))
        heading = self.say("Inputs")
        return f"# {self.title}\n{_MADE}\n\n{self.description}\n\n## {heading}\n\n{text}{listed}\n\n{footer}\n"

    def entry(self) -> dict[str, Any]:
        """In a file of names and tooltips."""
        inputs = {name: {"name": name, "tooltip": tooltip} for name, tooltip in self.inputs.items()}
        return {"display_name": self.title, "description": self.description, "inputs": inputs}


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
    nodes = pack().drop_in_nodes.all_nodes()
    texts = [(node.__name__, locale, Texts(node, locale)) for node in nodes for locale in LANGUAGES]
    made = {PAGES / name / f"{locale}.md": each.page() for name, locale, each in texts}
    for language in OTHER_LANGUAGES:  # in English they are in the nodes
        path = LOCALES / language / "nodeDefs.json"
        entries = {name: each.entry() for name, locale, each in texts if locale == language}
        made[path] = json.dumps(json.loads(path.read_text()) | entries, ensure_ascii=False, indent=2) + "\n"
    changed = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
    for path in changed:
        print(path.relative_to(ROOT))
        if not only_check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(made[path])
    return int(only_check and bool(changed))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
