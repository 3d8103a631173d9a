"""The Comfy Compiler, which newer ComfyUIs have: it is kept out of what it would break, and streaming goes through it.

Here it is its switch and its recordings alone; `benchmarks/comfy_compiler.py` runs the real one on a GPU.
"""

import contextlib
import sys
import threading
import types

import pytest
from computing import computing as computing
from computing import expected as expected
from computing import inference_mode as inference_mode
from computing import load, same
from sampling import sample

from distorch2.comfyui import core

KINDS = ("flux",)
SPLIT = "sim:0,50%;sim:1,50%"


@pytest.fixture
def compiler(monkeypatch):
    """ComfyUI's switch and its recordings by thread."""
    prefetch = types.ModuleType("comfy.model_prefetch")
    prefetch.MALLOC_GRAPHS, prefetch.paused = {}, []

    @contextlib.contextmanager
    def pause_malloc_graph():
        prefetch.paused.append("begin")
        yield
        prefetch.paused.append("end")

    prefetch.pause_malloc_graph = pause_malloc_graph
    monkeypatch.setitem(sys.modules, "comfy.model_prefetch", prefetch)
    monkeypatch.setattr(core.args, "disable_comfy_compiler", False, raising=False)
    return prefetch


@pytest.mark.parametrize("is_disabled", [False, True])
def test_the_compiler_is_off_while_any_thread_wants_it_off(compiler, monkeypatch, is_disabled):
    monkeypatch.setattr(core.args, "disable_comfy_compiler", is_disabled)
    inside, leave = threading.Event(), threading.Event()

    def other_thread():
        with core.without_compiler():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other_thread)
    with core.without_compiler():
        assert core.args.disable_comfy_compiler
        thread.start()
        assert inside.wait(10)
    assert core.args.disable_comfy_compiler
    leave.set()
    thread.join()
    assert core.args.disable_comfy_compiler == is_disabled
    with pytest.raises(KeyboardInterrupt), core.without_compiler():
        raise KeyboardInterrupt
    assert core.args.disable_comfy_compiler == is_disabled


def test_a_recording_is_seen_by_its_own_thread(compiler):
    assert not core.is_compiler_active()
    graph = types.SimpleNamespace(_comfy_active=True)
    compiler.MALLOC_GRAPHS[threading.get_ident()] = graph
    assert core.is_compiler_active()
    graph._comfy_active = False
    assert not core.is_compiler_active()
    compiler.MALLOC_GRAPHS = {0: types.SimpleNamespace(_comfy_active=True)}
    assert not core.is_compiler_active()


def test_without_a_compiler_nothing_is_switched(monkeypatch):
    monkeypatch.delattr(core.args, "disable_comfy_compiler", raising=False)
    monkeypatch.delitem(sys.modules, "comfy.model_prefetch", raising=False)
    with core.without_compiler(), core.outside_compiler():
        assert not hasattr(core.args, "disable_comfy_compiler")
        assert not core.is_compiler_active()


# --- with models


@pytest.mark.quick
@pytest.mark.usefixtures("inference_mode", "computing")
@pytest.mark.parametrize(("donor_mode", "is_disabled"), [("auto", True), ("stream", False)])
def test_it_is_off_in_forwards_that_are_relayed_and_on_in_others(
    checkpoints, expected, compiler, monkeypatch, donor_mode, is_disabled
):
    model, clip = load(checkpoints, "flux", SPLIT, donor_mode)
    seen, forward = [], type(model.model.diffusion_model).forward

    def watched(*arguments, **options):
        seen.append(core.args.disable_comfy_compiler)
        return forward(*arguments, **options)

    monkeypatch.setattr(type(model.model.diffusion_model), "forward", watched)
    assert same(sample(model, clip), expected["flux"])
    assert set(seen) == {is_disabled}
    assert not core.args.disable_comfy_compiler
    assert (model.distribution.relay is not None) == is_disabled


@pytest.mark.usefixtures("inference_mode", "computing")
def test_units_stay_at_home_while_a_forward_is_recorded(checkpoints, expected, compiler):
    """As in a text encoder, whose forward has no wrapper."""
    compiler.MALLOC_GRAPHS[threading.get_ident()] = types.SimpleNamespace(_comfy_active=True)
    model, clip = load(checkpoints, "flux", SPLIT, "auto")
    assert same(sample(model, clip), expected["flux"])
    relay = model.distribution.relay
    assert relay.activations.bytes_sent == 0
    assert relay.streamer.staging.nbytes > 0
    assert compiler.paused == ["begin", "end"]  # for the staging buffer, which stays
