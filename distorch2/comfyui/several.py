"""Several devices that run the same model at once, each for other conditionings: ComfyUI's MultiGPU CFG Split."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from . import core

MULTIGPU = "multigpu"
"""The key of a patcher's additional models under which ComfyUI has the copies for other devices."""


def devices_of(patchers: Iterable[core.ModelPatcher]) -> tuple[str, ...]:
    return tuple(sorted(str(patcher.load_device) for patcher in patchers))


def around_sampling(executor: Any, *arguments: Any, **options: Any) -> Any:
    """A wrapper of a guider's sampling: where one conditioning is all that runs, the copies are left alone.

    ComfyUI would load them, and have one of them run it.
    """
    guider = executor.class_obj
    patcher = guider.model_patcher
    copies = patcher.get_additional_models_with_key(MULTIGPU)
    if not copies or _num_conditionings(guider) > 1:
        return executor(*arguments, **options)
    patcher.remove_additional_models(MULTIGPU)
    try:
        return executor(*arguments, **options)
    finally:
        patcher.set_additional_models(MULTIGPU, copies)


def _num_conditionings(guider: Any) -> int:
    """How many run in a step: the negative one does not without guidance, unless something asks for it."""
    conditionings = dict(guider.conds)
    is_plain = type(guider).predict_noise is core.CFGGuider.predict_noise
    needs_negative = guider.model_options.get("disable_cfg1_optimization", False)
    if is_plain and not needs_negative and math.isclose(guider.cfg, 1.0):
        conditionings.pop("negative", None)
    return sum(len(each) for each in conditionings.values() if each)
