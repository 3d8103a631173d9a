"""The suite runs inside a real ComfyUI: `make test` finds or fetches it and names it in COMFYUI_PATH."""

from __future__ import annotations

import functools
import gc
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMFYUI_PATH = Path(os.environ.get("COMFYUI_PATH", ""))
if not (COMFYUI_PATH / "comfy").is_dir():
    pytest.exit("COMFYUI_PATH names no ComfyUI; run the suite with `make test`", returncode=4)

# ComfyUI's modules come before ours: both have a `nodes`, and ours is only ever imported as part of the pack.
sys.path[:0] = [str(COMFYUI_PATH), str(ROOT / "tools")]
sys.path += [str(ROOT), str(ROOT / "benchmarks")]

import comfy.cli_args  # noqa: E402
import folder_paths  # noqa: E402
import only_gpu_skips  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from host import DEFAULT_VERSION  # noqa: E402
from progress import Progress  # noqa: E402

NUM_ACCELERATORS = torch.cuda.device_count()
comfy.cli_args.args.cpu = NUM_ACCELERATORS == 0


# --- several processes side by side


GIB = 1024**3
PROCESS_BYTES = 4 * GIB
"""What a process of the suite needs at most, with the server that a test of it has started."""


def pytest_xdist_auto_num_workers():
    """Processes for `-n auto`, which share the cores. Accelerators are for one process alone."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    num_processes = min(num_cores, psutil.virtual_memory().available // PROCESS_BYTES)
    if NUM_ACCELERATORS or num_processes < 2:
        return 0
    # Torch's threads wait by spinning; this is for the processes that are started, and the servers of their tests.
    os.environ.setdefault("OMP_NUM_THREADS", str(num_cores // num_processes))
    return num_processes


LONGEST_GROUPS = (f"test_server_with_donors {DEFAULT_VERSION}", "test_streaming", "test_compatibility", "test_lora")
LONGEST_GROUPS += ("test_front_end", "test_memory", "test_relay", "test_simulated_accelerators", "test_compiling")
LONGEST_GROUPS += (f"test_server {DEFAULT_VERSION}", "test_server_with_donors")
"""They start first, so that none is left over at the end. Tests of one group run in one process, in their order."""


def group_of(node_id):
    """The file of a test; where a file starts a server for each version of ComfyUI, the version as well."""
    file = Path(node_id.partition("::")[0]).stem
    version = re.search(r"\b\d+\.\d+\.\d+\b( with newest packages)?", node_id.partition("[")[2])
    return f"{file} {version[0]}" if version else file


def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return group_of(nodeid)

    return ByGroup(config, log)


@pytest.hookimpl(trylast=True)  # after that of the terminal
def pytest_configure(config):
    config.pluginmanager.register(only_gpu_skips)
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Progress(config))


def pytest_collection_modifyitems(items):
    for item in items:
        quick = item.get_closest_marker("quick")
        if quick and quick.args and item.callspec.id not in quick.args:
            item.own_markers.remove(quick)
        needed = 2 if item.get_closest_marker("multigpu") else 1 if item.get_closest_marker("gpu") else 0
        if needed > NUM_ACCELERATORS:
            reason = f"needs {needed} accelerator(s), this machine has {NUM_ACCELERATORS}"
            item.add_marker(pytest.mark.skip(reason=reason))
    rank = {group: place for place, group in enumerate(LONGEST_GROUPS)}
    items.sort(key=lambda item: rank.get(group_of(item.nodeid), len(rank)))


# --- what all tests share


@pytest.fixture(autouse=True, scope="module")
def garbage_is_looked_for_among_new_objects():
    """What is there before a file's tests stays. ComfyUI and the tests collect garbage often: half of their time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def tokenizers_are_made_once():
    """ComfyUI makes those of its text encoders anew for every load, which takes longer than the small models here."""
    from transformers import PreTrainedTokenizerBase

    make = PreTrainedTokenizerBase.from_pretrained.__func__
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(PreTrainedTokenizerBase, "from_pretrained", classmethod(functools.cache(make)))
        yield


@pytest.fixture(autouse=True, scope="session")
def users_files_are_not_touched(tmp_path_factory):
    """Nor used: speeds that were measured, say."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(folder_paths, "user_directory", str(tmp_path_factory.mktemp("user")))
        yield


@pytest.fixture(scope="session")
def checkpoints():
    """kind -> path of a small real checkpoint, made on first use and kept between runs."""
    from checkpoints import ensure_checkpoint

    return lambda kind: str(ensure_checkpoint(kind, ROOT / ".host" / "checkpoints"))
