"""Who may import whom. The parts that only calculate run without torch and without ComfyUI."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.quick

SHIPPED = [*ROOT.glob("*.py"), *(ROOT / "distorch2").rglob("*.py")]
MAY_IMPORT_COMFYUI = {"nodes.py", "drop_in_nodes.py", "core.py"}
PURE = [
    "allocation_parser",
    "distorch2.plan",
    "distorch2.planner",
    "distorch2.schedule",
    "distorch2.report",
    "distorch2.checkpoint_file",
]
COMFYUI_MODULES = {"comfy", "comfy_api", "folder_paths", "server", "nodes", "execution", "comfyui_version"}
# Each may import those after it, and none before it.
LAYERS = [
    "drop_in_nodes",
    "nodes",
    "loading",
    "whole",
    "patcher",
    "distribution",
    "detour",
    "donor_share",
    "sharing",
    "failures",
    "relay",
    "lookup",
    "reading",
]
LAYERS += [
    "streaming",
    "forwards",
    "schedule",
    "activations",
    "moving",
    "inventory",
    "pinning",
    "sources",
    "slab",
    "quantised",
]
LAYERS += ["transfer", "report", "planner", "plan", "checkpoint_file", "core", "__init__"]


def imports(path):
    """(module, level) of every import statement, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_only_the_files_that_meet_comfyui_import_it(path):
    names = {module.partition(".")[0] for module, level in imports(path) if level == 0}
    if path.name not in MAY_IMPORT_COMFYUI:
        assert not names & COMFYUI_MODULES


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_imports_of_our_own_are_relative_and_point_one_way(path):
    own = {file.stem for file in SHIPPED if file.stem not in ("__init__", "nodes")} | {"distorch2"}
    assert not {module.partition(".")[0] for module, level in imports(path) if level == 0} & own
    if ROOT / "distorch2" in path.parents:
        depth = len(path.relative_to(ROOT).parts) - 1
        assert all(level <= depth for _, level in imports(path)), "distorch2 imports nothing from the root"
        imported = {module.rpartition(".")[2] for module, level in imports(path) if level}
        assert not imported & set(LAYERS[: LAYERS.index(path.stem)])
    if path.stem in ("allocation_parser", "device_utils"):
        assert all(level == 0 for _, level in imports(path))


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_run_with_the_standard_library_alone(module):
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {module}; assert 'torch' not in sys.modules"
    # -S leaves site-packages out, so that nothing but the standard library can be found.
    subprocess.run([sys.executable, "-S", "-E", "-c", script], check=True)


def test_every_test_that_the_documentation_names_exists():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "how_comfyui_is_met.md").read_text()))
    defined = set(
        re.findall(r"^def (test_\w+)", "\n".join(p.read_text() for p in ROOT.glob("tests/*.py")), re.MULTILINE)
    )
    assert named
    assert named <= defined
