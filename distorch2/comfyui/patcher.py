"""DistributedPatcher: ComfyUI's memory manager in front, slabs and streaming behind.

[Note: which methods are overridden] ComfyUI's own versions of `load`, `unpatch_model`, `partially_load` and
`partially_unload` move modules with `.to()`, which would undo a plan. `_load_list` and the pinning methods are only
called by those, or do nothing since nothing is pinned by them. `detach` is inherited: with `unpatch_all=False`, as
ComfyUI calls it when clones are swapped or collected, it touches no weight. What belongs to the weights lives on the
module, which clones share.

[Note: the order of a load] The module's own weights are placed, since these are what the plan names; then object
patches are set, and what they brought is placed as well; then weights are patched.
"""

from __future__ import annotations

import contextlib
import logging
import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..planning.plan import GIB, Layer, Plan, size_text
from ..planning.planner import plan_beside
from ..serving.distribution import Distribution
from ..serving.forwards import drop_copied_forwards
from ..serving.pair import RelayedPair
from ..weights.devices import CPU, DISK_NAME, device_of
from ..weights.files import FileError
from ..weights.inventory import own_tensors
from . import core
from .core import ModelPatcher, mm
from .failures import OUT_OF_MEMORY, is_device_lost, is_out_of_memory
from .lora import WeightPatcher, split_key
from .patcher_state import ATTRIBUTE, Request, Shared, StandIns, shared_of, stand_ins_of
from .program import COMFYUI
from .several import MULTIGPU, around_sampling, devices_of
from .sharing import unhook_original, unload

logger = logging.getLogger(__name__)


_OF_ONE_PATCHER = {"object_patches", "attachments", "additional_models", "callbacks", "hook_patches"}
"""Attributes of a patcher that may keep much else alive."""


class DistributedPatcher(WeightPatcher):
    """Serves a module's weights from the devices of a plan. Made by `take_over`, or by `with_plan` of another."""

    request = Request()
    _stand_ins = StandIns()
    _others: tuple[str, ...] = ()
    """Of a copy for one of several devices: those that run the model at the same time. The first has the copies."""
    pair: RelayedPair | None = None
    """During a run in which the module runs for its copies, too."""
    pair_plan: Plan | None = None
    """With which it is served then; None where each copy serves its own weights. It stays after the run, for which the
    weights lie so."""
    _runner: weakref.ref[DistributedPatcher] | None = None
    """Of a copy: the patcher whose module runs its inputs, and which holds the copy."""
    _device_dtype: tuple[torch.dtype | None, bool] | None = None
    """A dtype of computation that was set for the device, and whether weights were cast by force before."""

    @classmethod
    def take_over(cls, fresh: ModelPatcher, plan: Plan, high_precision_loras: bool = True) -> DistributedPatcher:
        """A patcher in the place of `fresh`, whose module has no patchers of other classes beside it.

        Every attribute is copied: what a loader set on its patcher is not lost. With `high_precision_loras` a weight
        that is stored in 8 bits or fewer is kept in the dtype of computation while it is patched.
        """
        unload(fresh.model)
        patcher = cls(fresh.model, torch.device(plan.compute_device), CPU)
        own = {"load_device", "offload_device", "size"}
        patcher.__dict__.update({name: value for name, value in vars(fresh).items() if name not in own})
        patcher.request = Request(plan, high_precision_loras)
        patcher._stand_ins = stand_ins_of(fresh.model)
        patcher.parent = patcher._stand_in()
        for place, wrapper in (
            (core.WrappersMP.APPLY_MODEL, _around_forward),
            (core.WrappersMP.OUTER_SAMPLE, around_sampling),
        ):
            patcher.remove_wrappers_with_key(place, ATTRIBUTE)
            patcher.add_wrapper_with_key(place, ATTRIBUTE, wrapper)
        return patcher

    def clone(self, *arguments: Any, **options: Any) -> DistributedPatcher:
        """As ComfyUI's; one with a module of its own is split and serves LoRAs in the same way."""
        clone = super().clone(*arguments, **options)
        clone.request, clone._others, clone._device_dtype = self.request, self._others, self._device_dtype
        clone._stand_ins = self._stand_ins if clone.model is self.model else stand_ins_of(clone.model)
        return clone

    def match_multigpu_clones(self) -> None:
        """As ComfyUI's, which makes the copies for other devices anew, each with this one's patches."""
        super().match_multigpu_clones()
        copies = self.get_additional_models_with_key(MULTIGPU)
        for copy in copies:
            if isinstance(copy, DistributedPatcher):
                copy._others = devices_of(each for each in (self, *copies) if each is not copy)
                copy.parent = copy._stand_in()  # ComfyUI has this one, which is of another module
                copy._runner = weakref.ref(self) if self.pair_plan is not None else None

    @property
    def _run_by(self) -> DistributedPatcher | None:
        """The patcher whose module runs the inputs of this one, which needs no weights."""
        return self._runner() if self._runner is not None else None

    def set_device_dtype(self, dtype: torch.dtype | None) -> None:
        """As `set_model_compute_dtype`, for the time that this device computes."""
        self._device_dtype = dtype, self.force_cast_weights
        self.set_model_compute_dtype(dtype)

    def drop_device_dtype(self) -> None:
        """Undo `set_device_dtype`, unless another dtype was set since."""
        if self._device_dtype is not None:
            dtype, was_forced = self._device_dtype
            if self.object_patches["manual_cast_dtype"] is dtype:
                del self.object_patches["manual_cast_dtype"]
                self.force_cast_weights = was_forced
            self._device_dtype = None

    def with_plan(self, plan: Plan, high_precision_loras: bool = True) -> DistributedPatcher:
        """A clone with another plan. The module has the weights as planned for the patcher that was loaded last."""
        clone = self.clone()
        clone.load_device = torch.device(plan.compute_device)
        clone.request = Request(plan, high_precision_loras)
        clone.parent = clone._stand_in()
        return clone

    def _stand_in(self) -> DistributedPatcher:
        """The parent of all patchers of the module for this device: ComfyUI unloads by it what a patcher that is gone
        had loaded. It has neither plan nor patches."""
        if self.load_device not in self._stand_ins:
            stand_in = self.clone()
            stand_in.parent, stand_in.request, stand_in.patches = None, Request(), {}
            stand_in.model_options = {"transformer_options": {}}
            for name in _OF_ONE_PATCHER & vars(stand_in).keys():
                setattr(stand_in, name, {})
            stand_in._stand_ins = StandIns()
            self._stand_ins[self.load_device] = stand_in
        return self._stand_ins[self.load_device]

    @property
    def _shared(self) -> Shared:
        return shared_of(self.model)

    @staticmethod
    def layers_of(module: torch.nn.Module) -> Sequence[Layer]:
        """The layers of a module, as they are without patches."""
        return shared_of(module).layers

    @property
    def distribution(self) -> Distribution:
        """That of the module for this device, and for those that run the model at the same time.

        ComfyUI makes clones for another device by setting `load_device`, some with a module of their own.
        """
        device, copies = str(self.load_device), self.get_additional_models_with_key(MULTIGPU)
        others = devices_of(copies) if copies else self._others
        distributions = self._shared.distributions.setdefault(self.request, {})
        is_pair = self.pair_plan is not None
        found = distributions.get((device, others, is_pair))
        if found is None:
            plan = self.pair_plan or self._plan_for(device, others)
            shared_slabs = self.request.slabs if others and not is_pair else None
            found = Distribution(self.model, plan, COMFYUI, shared_slabs)
            distributions[(device, others, is_pair)] = found
        return found

    def _plan_for(self, device: str, others: Sequence[str]) -> Plan:
        """Another accelerator keeps as much as the one that was planned for; the host, where that is another, keeps
        everything; of several devices each what `plan_beside` gives it."""
        asked, layers = self.request.plan, self._shared.layers
        if asked is None or (device == "cpu" and asked.compute_device != "cpu"):
            return Plan.all_on(device, layers)
        if not others and device == asked.compute_device:
            return asked
        return plan_beside(asked, layers, device, others) if others else asked.exchanged(device, layers)

    def _log_plan(self, plan: Plan) -> None:
        """Of one that differs from what was asked."""
        kept = ", ".join(f"{size_text(plan.bytes_on(each))} on {each}" for each in plan.devices)
        beside = f", beside {' and '.join(plan.others)}" if plan.others else ""
        how = ", as a relayed pair" if self.pair_plan is not None else beside
        logger.info("DisTorch2: %s for %s%s: %s", type(self.model).__name__, plan.compute_device, how, kept)

    def model_size(self) -> int:
        """Bytes that the model needs on its compute device: resident layers, patched, and staging buffers."""
        if self._run_by is not None:
            return 0
        return self._plan().compute_bytes + self.distribution.unplanned_bytes

    @property
    def _in_place(self) -> Distribution:
        """The distribution that has the weights on this device: a patcher with another plan may have placed them."""
        placed = self._shared.placed
        is_here = placed is not None and placed.is_placed and placed.device == self.load_device
        return placed if placed is not None and is_here else self.distribution

    @property
    def placed(self) -> Distribution | None:
        """The one that has the weights on their devices now."""
        placed = self._shared.placed
        return placed if placed is not None and placed.is_placed else None

    def _left_behind(self) -> Distribution | None:
        """What is placed on another device by a patcher that is gone: ComfyUI turns to its parent, this one perhaps."""
        placed = self._shared.placed
        if placed is None or not placed.is_placed or placed.device == self.load_device:
            return None
        loaded = [each.model for each in mm.current_loaded_models if each.model is not None]
        is_in_use = any(each.model is self.model and each.load_device == placed.device for each in loaded)
        return None if is_in_use else placed

    def _a_pass(self) -> contextlib.AbstractContextManager[None]:
        """Around each pass. That of a copy is inside the forward that `RelayedPair` has given it."""
        pair = self.pair
        if self._run_by is not None:
            return contextlib.nullcontext()
        return self.distribution.running() if pair is None else pair.own_pass()

    def loaded_size(self) -> int:
        """Bytes that the model has there."""
        return self._in_place.compute_bytes

    def model_patches_models(self) -> list[ModelPatcher]:
        """Models to be loaded with this one: those of ComfyUI's patches, and what lies on other accelerators."""
        shares = [] if self._run_by is not None else self.distribution.shares
        return [*super().model_patches_models(), *shares]

    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        """Place the weights, in up to `lowvram_model_memory` bytes of the compute device if it is not 0, and apply this
        clone's patches to them."""
        if self._run_by is not None:
            self.model.device = self.load_device
            return
        with self.use_ejected():
            self._place(lowvram_model_memory or math.inf)
            self._patch_weights(anew=force_patch_weights)
            self.distribution.resume()
            self._set_casting()
            self.model.model_lowvram = False
            self.model.lowvram_patch_counter = 0
            self.model.device = self.load_device
            self.model.model_loaded_weight_memory = self.loaded_size()
            self.model.model_offload_buffer_memory = 0
            self.model.current_weight_patches_uuid = self.patches_uuid
            for callback in self.get_all_callbacks(core.CallbacksMP.ON_LOAD):
                callback(self, device_to, lowvram_model_memory, force_patch_weights, full_load)
            self.apply_hooks(self.forced_hooks, force_apply=True)

    def _check_compilation(self) -> None:
        """Say what torch.compile makes of layers that are served; raises `RuntimeError` where it would fail."""
        how = self.model_options.get("torch_compile_kwargs")  # where ComfyUI's node notes it
        num_served = sum(len(group.layers) for group in self.distribution.plan.groups)
        if how is None or not num_served:
            return
        if how.get("fullgraph"):
            raise RuntimeError(
                f"torch.compile with fullgraph=True cannot compile a model with {num_served} layers on donors; turn it "
                "off, or keep the whole model on the compute device"
            )
        if not self._shared.has_logged_compilation:
            self._shared.has_logged_compilation = True
            logger.info("DisTorch2: torch.compile cannot compile across the %d layers on donors", num_served)

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Load as planned, or as much as fits into `extra_memory` bytes more than are used; returns the bytes added."""
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            before = self.loaded_size()
            granted = before + extra_memory or 0.1  # nothing at all would mean no limit
            with self._all_or_nothing():
                self._place_unpatched(granted)
                if self.model.current_weight_patches_uuid == self.patches_uuid and not force_patch_weights:
                    self._place(granted)  # what object patches brought
                    self.apply_hooks(self.forced_hooks, force_apply=True)
                else:
                    self.load(device_to, lowvram_model_memory=granted, force_patch_weights=force_patch_weights)
            return self.loaded_size() - before

    def partially_unload(
        self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Stream resident weights from the host until so much is free, or no more can be; returns the bytes freed."""
        before = self.loaded_size()
        if self._in_place is not self.distribution:
            return 0  # it was placed for another patcher: ComfyUI unloads all of it
        if self._plan().within(before - memory_to_free).compute_bytes > before - memory_to_free:
            return 0  # ComfyUI unloads all of it, and what would be put into slabs would not be used
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            try:
                with self._all_or_nothing():
                    self._place_unpatched(before - memory_to_free, is_cancellable=False)
            except (OUT_OF_MEMORY, FileError) as error:
                # An exception here, also that of a cancelled prompt, would break ComfyUI's list of loaded models.
                # Nothing is on the device any more.
                logger.warning("DisTorch2: %s", str(error))
            return before - self.loaded_size()

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Nothing of the model stays on any device when it could not be placed."""
        try:
            yield
        except BaseException as error:
            is_lost = is_device_lost(error)
            with contextlib.suppress(RuntimeError) if is_lost else contextlib.nullcontext():
                self.detach()  # of which any step may raise where the device is lost
            if is_lost:
                raise RuntimeError(self.device_lost_message("placing", error)) from error
            if is_out_of_memory(error):
                advice = "give the full device less, or unload other models"
                raise OUT_OF_MEMORY(self.out_of_memory_message("placing", advice, error)) from error
            raise

    def _place_unpatched(self, compute_bytes: float, is_cancellable: bool = True) -> None:
        """Place the module's own weights, then set this clone's object patches."""
        self.unpatch_hooks()  # first: they may have written into weights that an object patch brought
        if self.model.current_weight_patches_uuid != self.patches_uuid:
            # Backups go by name, and weights of object patches are, or will be, those of another module. And weights
            # larger than this clone has them would take room that is not planned.
            paths = tuple(f"{path}." for path in {*self.object_patches, *self.object_patches_backup})
            self._unpatch_weights(
                [
                    key
                    for key, backup in self.backup.items()
                    if key.startswith(paths) or (backup.kept_dtype is not None and self._kept_dtype(key) is None)
                ]
            )
        self.unpatch_model(unpatch_weights=False)  # another clone's object patches
        self._place(compute_bytes, is_cancellable)
        self.patch_model(load_weights=False)
        for module in self.model.modules():
            if hasattr(module, "comfy_patched_weights"):
                module.comfy_patched_weights = not self.distribution.is_on_donor(module)
        self.model.model_loaded_weight_memory = self.loaded_size()

    def patch_model(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: float = 0,
        load_weights: bool = True,
        force_patch_weights: bool = False,
    ) -> torch.nn.Module:
        if load_weights:
            # Without object patches: the plan is for the model's own modules.
            self._place(lowvram_model_memory or math.inf)
        with self._unserved():
            super().patch_model(device_to, load_weights=False)
            self.eject_model()
        if load_weights:
            self.load(device_to, lowvram_model_memory, force_patch_weights)
        self.inject_model()  # around the forwards that serve weights
        return self.model

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        """Without `device_to` the originals go where the weights lie; with a device everything goes to the host."""
        self.eject_model()
        if unpatch_weights:  # before object patches: a patched weight may be one of theirs
            self.unpatch_hooks()
            if device_to is None:
                self._unpatch_weights(list(self.backup))
                self.distribution.resume()
                self._forget_patches()
            else:
                self._release(self._left_behind() or self._in_place)
        with self._unserved():
            super().unpatch_model(unpatch_weights=False)
        if unpatch_weights and device_to is not None:
            self._release(self.distribution)  # what was hidden by object patches
            self.model.device = device_to
            self.model.model_loaded_weight_memory = 0

    def inject_model(self) -> None:
        super().inject_model()
        if self.is_injected and self.distribution.relay is not None:
            self.distribution.relay.is_allowed = False  # what is injected lies on the compute device

    def eject_model(self) -> None:
        was_injected = self.is_injected
        super().eject_model()
        if was_injected and self.distribution.relay is not None:
            self.distribution.relay.is_allowed = True

    def add_object_patch(self, name: str, obj: Any) -> None:
        """As ComfyUI's, which makes some of shallow copies of modules with another configuration."""
        if isinstance(obj, torch.nn.Module):
            drop_copied_forwards(obj)
        super().add_object_patch(name, obj)

    def model_state_dict_for_saving(self, model: torch.nn.Module | None = None, prefix: str = "") -> dict[str, Any]:
        """As ComfyUI's, with weights on donors in host memory."""
        hiding = {child for child in self.model.modules() if self._in_place.hides_patches(child)}
        streamed = [
            child
            for child in self.model.modules()
            if getattr(child, "comfy_patched_weights", None) is False and child not in hiding
        ]
        for child in streamed:
            child.comfy_patched_weights = True  # so that what is in place is taken
        try:
            state_dict = super().model_state_dict_for_saving(model, prefix)
        finally:
            for child in streamed:
                child.comfy_patched_weights = False
        for key in self.patches:  # of modules that are no operations of ComfyUI's, which it would compute itself
            saved = key.removeprefix(prefix)
            is_own = self._is_patched_by_comfyui(key) and type(state_dict.get(saved)) is torch.Tensor
            if is_own and self._owner(key)[0] in hiding:
                state_dict[saved] = self.patch_weight_to_device(key, self.load_device, return_weight=True).to(CPU)
        donors = {device_of(donor) for donor in self.distribution.plan.donors}
        return {
            name: value.to(CPU) if getattr(value, "device", CPU) in donors else value
            for name, value in state_dict.items()
        }

    def _release(self, distribution: Distribution) -> None:
        self.model.current_weight_patches_uuid = None
        distribution.release(self._originals())
        self._forget_patches()

    @contextlib.contextmanager
    def _unserved(self) -> Iterator[None]:
        """For object patches to be set or given back: they may be forwards, or modules that are served."""
        self.eject_model()
        if self.object_patches or self.object_patches_backup:
            with self.distribution.unserved():
                yield
        else:
            yield

    def _place(self, compute_bytes: float = math.inf, is_cancellable: bool = True) -> None:
        """Place the weights as planned for this patcher, and not for another any more."""
        if self._run_by is not None:
            return
        self.unpatch_hooks()  # before weights move
        unhook_original(self.model)
        here, placed = self.distribution, self._shared.placed
        if placed is not None and placed is not here and placed.is_placed:
            self._release(placed)
        self._shared.placed = here
        if placed is not here and here.asked is not self.request.plan:
            self._log_plan(here.asked)
        here.begin_run()
        here.place(self._plan().within(compute_bytes, here.plan), is_cancellable)
        if placed is not None and placed is not here:
            placed.drop_unbound()
        self._check_compilation()

    def _plan(self) -> Plan:
        """The plan as asked, with what this clone's patches add to it."""
        asked, cached = self.distribution.asked, vars(self).get("_planned")
        if cached is None or cached[0] is not asked or cached[1:3] != (self.patches_uuid, self._compute_dtype):
            patched = asked.with_extra_bytes(self._extra_bytes())
            cached = self._planned = (asked, self.patches_uuid, self._compute_dtype, patched)
        return cached[3]

    def _set_casting(self) -> None:
        """What ComfyUI's operations ask of their module, as for a model that is loaded completely."""
        kept_in_full = {split_key(key)[0] for key in self.patches if self._kept_dtype(key) is not None}
        for name, module in self.model.named_modules():
            if not own_tensors(module):
                continue
            core.wipe_lowvram_weight(module)
            # A quantised operation is not to quantise the input of a layer whose weight is not quantised any more.
            module.comfy_force_cast_weights = self.force_cast_weights or name in kept_in_full
            # Whoever computes with a weight that is streamed shall ask for it on the compute device.
            module.comfy_patched_weights = not self.distribution.is_on_donor(module)
            if not hasattr(module, "comfy_cast_weights"):
                continue
            if self.force_cast_weights:
                module.prev_comfy_cast_weights = module.comfy_cast_weights
                module.comfy_cast_weights = True
            module.weight_function.extend(self.weight_wrapper_patches.get(f"{name}.weight", []))
            module.bias_function.extend(self.weight_wrapper_patches.get(f"{name}.bias", []))
            core.move_weight_functions(module, self.load_device)

    def out_of_memory_message(self, doing: str, advice: str, error: BaseException) -> str:
        plan = self.distribution.plan
        kept = ", ".join(f"{plan.bytes_on(device) / GIB:.2f} GiB on {device}" for device in plan.devices)
        return (
            f"out of memory while {doing} {type(self.model).__name__}: the plan keeps {kept}, and streams through "
            f"{plan.staging_bytes / GIB:.2f} GiB on {plan.compute_device}; {advice} ({error})"
        )

    def device_lost_message(self, doing: str, error: BaseException) -> str:
        devices = " or ".join(
            device for device in self.distribution.plan.devices if device not in (str(CPU), DISK_NAME)
        )
        reason = str(error).splitlines()[0]
        return f"{devices} failed while {doing} {type(self.model).__name__} ({reason}); restart ComfyUI"


def _around_forward(executor: Any, *arguments: Any, **options: Any) -> Any:
    """A wrapper of the model's forward.

    ComfyUI's compiler is kept out of a forward that is relayed. When there is no memory the error says what the plan
    has to do with it, and when a device is lost, what is left to do.
    """
    patcher = getattr(executor.class_obj, "current_patcher", None)
    if not isinstance(patcher, DistributedPatcher):
        return executor(*arguments, **options)
    around_pass = patcher._a_pass()
    patcher = patcher._run_by or patcher
    try:
        with (
            around_pass,
            contextlib.nullcontext() if patcher.distribution.relay is None else core.without_compiler(),
        ):
            return executor(*arguments, **options)
    except RuntimeError as error:
        if is_device_lost(error):
            raise RuntimeError(patcher.device_lost_message("running", error)) from error
        if not is_out_of_memory(error):
            raise
        advice = f"keep less of it on {patcher.load_device}, or make the image or the batch smaller"
        raise OUT_OF_MEMORY(patcher.out_of_memory_message("running", advice, error)) from error
