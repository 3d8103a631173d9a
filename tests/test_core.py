"""The names of ComfyUI that the package uses: all of them are listed, and every supported version has them."""

import ast
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import comfy.model_management as mm
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from conftest import COMFYUI_PATH, ROOT
from host import SDISTS, fetch_comfyui

from distorch2.comfyui import core
from distorch2.comfyui.donor_share import DonorShare
from distorch2.comfyui.patcher import DistributedPatcher

MODULES = {
    "mm": "comfy.model_management",
    **{name: f"comfy.{name}" for name in ("lora", "model_detection", "sd", "utils")},
}
PACKAGE = [path for path in (ROOT / "distorch2").rglob("*.py") if path.name != "core.py"]


def chains(path):
    """Every dotted name in a file, such as `core.sd.CLIP`, as a tuple of its parts, with the parts of its start."""
    for node in ast.walk(ast.parse(path.read_text())):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name):
            yield (node.id, *parts)


def names_used():
    """Module of ComfyUI -> the names in it that the package uses, by way of `core` and in it."""
    used = {}
    for path in PACKAGE:
        for first, *rest in chains(path):
            if first == "core" and len(rest) > 1:
                first, *rest = rest
            if first in MODULES:
                used.setdefault(MODULES[first], set()).add(rest[0])
    source = ROOT / "distorch2" / "comfyui" / "core.py"
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in core.NEEDED:
            used.setdefault(node.module, set()).update(alias.name for alias in node.names)
    for first, *rest in chains(source):
        if first == "comfy" and len(rest) > 1:
            used.setdefault(f"comfy.{rest[0]}", set()).add(rest[1])
        elif first in ("comfyui_version", "folder_paths"):
            used.setdefault(first, set()).add(rest[0])
    return used


@pytest.mark.quick
def test_every_name_that_is_used_is_listed_and_no_other():
    assert {module: sorted(names) for module, names in core.NEEDED.items()} == {
        module: sorted(names) for module, names in names_used().items()
    }


def attributes_in_package():
    """Every attribute that any file of the package reads or sets, and every name of a method in it."""
    for path in PACKAGE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                yield node.attr
            elif isinstance(node, ast.FunctionDef):
                yield node.name


def test_every_attribute_of_a_patcher_that_is_used_is_listed_and_no_other():
    patcher = ModelPatcher(torch.nn.Module(), torch.device("cpu"), torch.device("cpu"))
    used = set()
    for path in PACKAGE:
        variables = {"patcher", "fresh", "taken", "clone", "distributed", "placed"}
        variables |= {"self"} if path.name in ("patcher.py", "donor_share.py") else set()
        for first, *rest in chains(path):
            parts = rest[1:] if rest[:1] == ["patcher"] else rest  # `vae.patcher`, `loaded.model` and the like
            if parts and (first in variables or parts is not rest):
                used.add(parts[0])
            if first == "loaded" and rest[:1] == ["model"]:
                used.update(rest[1:2])
    overridden = {name for cls in (DistributedPatcher, DonorShare) for name in vars(cls)}
    of_comfyui = {name for name in (used | overridden) & set(dir(patcher)) if not name.startswith("__")}
    assert len(of_comfyui) > 40
    assert of_comfyui <= set(core.PATCHER_ATTRIBUTES)
    assert set(core.PATCHER_ATTRIBUTES) | set(core.MODEL_ATTRIBUTES) <= set(attributes_in_package())


@pytest.mark.parametrize("cls", [DistributedPatcher, DonorShare])
def test_methods_that_are_overridden_take_what_comfyui_gives_them(cls):
    compared = 0
    for name, method in vars(cls).items():
        of_comfyui = vars(ModelPatcher).get(name)
        if inspect.isfunction(method) and inspect.isfunction(of_comfyui) and not name.startswith("__"):
            expected, taken = (inspect.signature(each).parameters for each in (of_comfyui, method))
            takes_all = [parameter.kind.name for parameter in taken.values()][1:] == ["VAR_POSITIONAL", "VAR_KEYWORD"]
            assert takes_all or [*expected] == [*taken], name
            compared += 1
    assert compared >= 5


REPORT = """
import json, sys
sys.path[:0] = [{tree!r}]
sys.path.append({root!r})
import comfy.cli_args
comfy.cli_args.args.cpu = True
from distorch2.comfyui import core
from comfy.supported_models_base import BASE
import inspect
print(json.dumps({{
    "version": core.version, "missing": core.missing(),
    "set_inference_dtype": [*inspect.signature(BASE.set_inference_dtype).parameters],
    "compiler": hasattr(core.args, "disable_comfy_compiler"),
}}))
"""


@pytest.mark.parametrize("version", sorted(SDISTS) if "DISTORCH2_FETCHED_COMFYUI" in os.environ else [core.version])
def test_every_supported_version_has_them_all(version):
    tree = COMFYUI_PATH if version == core.version else fetch_comfyui(version, Path(sys.executable))
    script = REPORT.format(tree=str(tree), root=str(ROOT))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    numbers = tuple(map(int, version.split(".")))
    assert found == {
        "version": version,
        "missing": [],
        "set_inference_dtype": ["self", "dtype", "manual_cast_dtype", *(["device"] if numbers >= (0, 27) else [])],
        "compiler": numbers >= (0, 34),
    }


@pytest.mark.quick
def test_what_is_missing_is_said_in_one_line_at_import(monkeypatch):
    monkeypatch.delattr(mm, "ensure_pin_budget")
    assert core.missing() == ["comfy.model_management.ensure_pin_budget"]
    spec = importlib.util.spec_from_file_location("anew", core.__file__)
    with pytest.raises(ImportError) as raised:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert str(raised.value) == (
        f"DisTorch2 does not work with ComfyUI {core.version}, which lacks comfy.model_management.ensure_pin_budget; "
        "update ComfyUI or DisTorch2"
    )


def test_a_patcher_that_lacks_something_is_noticed(monkeypatch):
    monkeypatch.delattr(ModelPatcher, "use_ejected")
    assert core.missing() == ["ModelPatcher.use_ejected"]
