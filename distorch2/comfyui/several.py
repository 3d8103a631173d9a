"""Several devices that run the same model at once, each for other conditionings: ComfyUI's MultiGPU CFG Split.

Each of them either serves a copy of the model, and streams what it does not keep; or all of them run one module, whose
units they have in turns: a relayed pair. With donor mode `relay` it is that, and with `auto` once copies have turned
out to be what the devices wait for.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..planning.plan import RELAY, STREAM, Plan
from ..planning.planner import plan_in_turns
from ..serving.pair import RelayedPair
from . import core
from .sharing import unload

logger = logging.getLogger(__name__)

MULTIGPU = "multigpu"
"""The key of a patcher's additional models under which ComfyUI has the copies for other devices."""
_MOST_WAITING = 0.25
"""Of the time. Where copies of the model wait longer for their weights, a relayed pair is faster; see
`benchmarks/several_gpus_forecast.py`."""


def devices_of(patchers: Iterable[core.ModelPatcher]) -> tuple[str, ...]:
    return tuple(sorted(str(patcher.load_device) for patcher in patchers))


def around_sampling(executor: Any, *arguments: Any, **options: Any) -> Any:
    """A wrapper of a guider's sampling. Where one conditioning is all that runs, the copies are left alone: ComfyUI
    would load them, and have one of them run it. Otherwise they run as a pair, where they are to."""
    guider = executor.class_obj
    patcher = guider.model_patcher
    copies = patcher.get_additional_models_with_key(MULTIGPU)
    if not copies:
        return executor(*arguments, **options)
    if _num_conditionings(guider) > 1:
        with _as_pair(patcher, copies, guider.conds):
            return executor(*arguments, **options)
    patcher.remove_additional_models(MULTIGPU)
    try:
        return executor(*arguments, **options)
    finally:
        patcher.set_additional_models(MULTIGPU, copies)


@contextlib.contextmanager
def _as_pair(patcher: Any, copies: Sequence[Any], conditionings: Mapping[str, Any]) -> Iterator[None]:
    plan = _plan_of_pair(patcher, copies, conditionings)
    if plan is None:
        yield
        return
    for copy in copies:
        unload(copy.model)
    modules = {copy.load_device: copy.model.diffusion_model for copy in copies}
    with (
        patcher.relayed_as_pair(plan) as distribution,
        RelayedPair(distribution, patcher.model.diffusion_model, modules).attached(),
    ):
        yield


def _plan_of_pair(patcher: Any, copies: Sequence[Any], conditionings: Mapping[str, Any]) -> Plan | None:
    asked = patcher.request.plan
    if asked is None or asked.donor_mode == STREAM or not asked.relays or not _may_be_paired(patcher, conditionings):
        return None
    if str(patcher.load_device) != asked.compute_device or not {*asked.relays} <= {*devices_of(copies)}:
        return None
    if asked.donor_mode != RELAY and not patcher.request.slabs.is_paired:
        distributions = [each.distribution for each in (patcher, *copies)]
        waiting = [each.waiting_part for each in distributions if not each.may_start_packing]
        if not any(part is not None and part > _MOST_WAITING for part in waiting):
            return None
        patcher.request.slabs.is_paired = True
    return plan_in_turns(asked, patcher.layers_of(patcher.model))


def _may_be_paired(patcher: Any, conditionings: Mapping[str, Any]) -> bool:
    """Whether the model, unlike its copies, has nothing that is there for its own device."""
    options = patcher.model_options.get("transformer_options", {})
    of_one_device = [
        *(options.get(name) for name in ("patches", "patches_replace", "optimized_attention_override")),
        *(each.get(core.WrappersMP.DIFFUSION_MODEL) for each in (patcher.wrappers, options.get("wrappers", {}))),
        patcher.injections,
        patcher.forced_hooks,
        patcher.weight_wrapper_patches,
        *(name for name in patcher.object_patches if name.startswith("diffusion_model")),
        *(each.get(name) for kind in conditionings.values() for each in kind or () for name in ("hooks", "gligen")),
    ]
    return not any(of_one_device)


def _num_conditionings(guider: Any) -> int:
    """How many run in a step: the negative one does not without guidance, unless something asks for it."""
    conditionings = dict(guider.conds)
    is_plain = type(guider).predict_noise is core.CFGGuider.predict_noise
    needs_negative = guider.model_options.get("disable_cfg1_optimization", False)
    if is_plain and not needs_negative and math.isclose(guider.cfg, 1.0):
        conditionings.pop("negative", None)
    return sum(len(each) for each in conditionings.values() if each)
