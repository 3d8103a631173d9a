"""Several devices that run the same model at once, each for other conditionings: ComfyUI's MultiGPU CFG Split.

There are two ways. Each device serves a copy of the model, and streams what it does not keep. Or the first module runs
for all of them, a relayed pair: always with donor mode `relay`, and with `auto` once a run of copies has waited for
weights for much of the time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..planning.plan import RELAY, STREAM, Plan
from ..planning.planner import plan_alternating
from ..serving.pair import RelayedPair
from . import core
from .sharing import unload

MULTIGPU = "multigpu"
"""The key of a patcher's additional models under which ComfyUI has the copies for other devices."""
_WAITING_FOR_A_PAIR = 0.35
"""Of the time. Where copies of the model wait longer for their weights, a relayed pair is taken to be faster. By the
forecast (`benchmarks/several_gpus_forecast.py`) it takes 1.2 times as long as whole copies, which would be 0.16; an
earlier version took 1.7 times as long, 0.40."""


def devices_of(patchers: Iterable[core.ModelPatcher]) -> tuple[str, ...]:
    return tuple(sorted(str(patcher.load_device) for patcher in patchers))


def around_sampling(executor: Any, *arguments: Any, **options: Any) -> Any:
    """A wrapper of a guider's sampling. With one conditioning the copies are hidden from ComfyUI, which would load them
    and have one of them run it. With more they run at once, or as a pair where there is a plan for it."""
    guider = executor.class_obj
    patcher = guider.model_patcher
    copies = patcher.get_additional_models_with_key(MULTIGPU)
    if not copies:
        return executor(*arguments, **options)
    plan = _plan_of_pair(patcher, copies, guider) if _num_conditionings(guider) > 1 else None
    if patcher.pair is None:  # else it is sampled inside of sampling
        patcher.pair_plan = plan
    if _num_conditionings(guider) > 1:
        with contextlib.nullcontext() if plan is None else _as_pair(patcher, copies):
            return executor(*arguments, **options)
    patcher.remove_additional_models(MULTIGPU)
    try:
        return executor(*arguments, **options)
    finally:
        patcher.set_additional_models(MULTIGPU, copies)


@contextlib.contextmanager
def _as_pair(patcher: Any, copies: Sequence[Any]) -> Iterator[None]:
    for copy in copies:
        unload(copy.model)
    modules = {copy.load_device: copy.model.diffusion_model for copy in copies}
    pair = RelayedPair(patcher.distribution, patcher.model.diffusion_model, modules)
    with pair.attached():
        patcher.pair = pair
        try:
            yield
        finally:
            patcher.pair = None


def _plan_of_pair(patcher: Any, copies: Sequence[Any], guider: Any) -> Plan | None:
    """None where the copies are to run."""
    asked = patcher.request.plan
    if asked is None or asked.donor_mode == STREAM or not {*asked.relays} <= {*devices_of(copies)}:
        return None
    if str(patcher.load_device) != asked.compute_device or patcher.pair is not None or not _can_be_paired(guider):
        return None
    if asked.donor_mode != RELAY:
        patcher.request.prefers_pair |= patcher.pair_plan is None and _have_waited([patcher, *copies])
        if not patcher.request.prefers_pair:
            return None
    return plan_alternating(asked, patcher.layers_of(patcher.model))


def _have_waited(patchers: Iterable[Any]) -> bool:
    """Whether one of the devices has waited too long for weights in the last run; not where these are yet to be
    packed."""
    distributions = [each.distribution for each in patchers]
    waiting = [each.waiting_part or 0.0 for each in distributions if not each.may_start_packing]
    return max(waiting, default=0.0) > _WAITING_FOR_A_PAIR


def _can_be_paired(guider: Any) -> bool:
    """False where ComfyUI has something for each device (hooks, patches, wrappers, injections): the inputs of a copy
    would meet what is there for the first one's."""
    patcher, options = guider.model_patcher, guider.model_options.get("transformer_options", {})
    for_each_device = [
        *(options.get(name) for name in ("patches", "patches_replace", "optimized_attention_override")),
        *(each.get(core.WrappersMP.DIFFUSION_MODEL) for each in (patcher.wrappers, options.get("wrappers", {}))),
        guider.model_options.get("torch_compile_kwargs"),
        patcher.injections,
        patcher.forced_hooks,
        patcher.weight_wrapper_patches,
        *(name for name in patcher.object_patches if name.startswith("diffusion_model")),
        *(each.get(name) for kind in guider.conds.values() for each in kind or () for name in ("hooks", "gligen")),
    ]
    return not any(for_each_device)


def _num_conditionings(guider: Any) -> int:
    """How many run in a step: the negative one does not without guidance, unless something asks for it."""
    conditionings = dict(guider.conds)
    is_plain = type(guider).predict_noise is core.CFGGuider.predict_noise
    needs_negative = guider.model_options.get("disable_cfg1_optimization", False)
    if is_plain and not needs_negative and math.isclose(guider.cfg, 1.0):
        conditionings.pop("negative", None)
    return sum(len(each) for each in conditionings.values() if each)
