"""Who may import whom. The parts that only calculate run without torch and without ComfyUI."""

import ast
import graphlib
import re
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.quick

SHIPPED = [*ROOT.glob("*.py"), *(ROOT / "distorch2").rglob("*.py")]
MAY_IMPORT_COMFYUI = {"nodes.py", "drop_in_nodes.py", "routes.py", "core.py"}
PURE = [
    "allocation_parser",
    *(f"distorch2.planning.{path.stem}" for path in (ROOT / "distorch2" / "planning").glob("*.py")),
    "distorch2.report",
    "distorch2.weights.checkpoint_file",
]
COMFYUI_MODULES = {"comfy", "comfy_api", "folder_paths", "server", "nodes", "execution", "comfyui_version"}
# Each may import from those after it, and none before it. "" is the package itself, and what lies beside it.
ROOMS = ["", "comfyui", "serving", "moving", "weights", "planning"]


def imports(path):
    """(module, level) of every import statement, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


def room_of(path):
    return path.parent.name if path.parent.parent == ROOT / "distorch2" else ""


def imported_files(path):
    """Those of the pack that it imports, by relative import."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            if base.is_dir():
                yield from (base / f"{alias.name}.py" for alias in node.names)
            else:
                yield base.with_suffix(".py")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_only_the_files_that_meet_comfyui_import_it(path):
    names = {module.partition(".")[0] for module, level in imports(path) if level == 0}
    if path.name not in MAY_IMPORT_COMFYUI:
        assert not names & COMFYUI_MODULES


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_imports_of_our_own_are_relative_and_lead_to_rooms_below(path):
    own = {file.stem for file in SHIPPED if file.stem not in ("__init__", "nodes")} | {"distorch2"}
    assert not {module.partition(".")[0] for module, level in imports(path) if level == 0} & own
    if ROOT / "distorch2" in path.parents:
        depth = len(path.relative_to(ROOT).parts) - 1
        assert all(level <= depth for _, level in imports(path)), "distorch2 imports nothing from the root"
    below = ROOMS[ROOMS.index(room_of(path)) :]
    assert [file for file in imported_files(path) if room_of(file) not in below] == []
    if path.stem in ("allocation_parser", "device_utils"):
        assert all(level == 0 for _, level in imports(path))


def test_imports_go_in_no_circle():
    graph = {path: set(imported_files(path)) for path in SHIPPED}
    assert all(file in SHIPPED for files in graph.values() for file in files)
    graphlib.TopologicalSorter(graph).prepare()


def test_only_one_room_has_streams_and_events():
    pattern = re.compile(r"\.(Stream|Event)\(|current_stream|wait_stream|wait_event")
    found = {room_of(path) for path in SHIPPED if pattern.search(path.read_text())}
    assert found == {"moving"}


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
