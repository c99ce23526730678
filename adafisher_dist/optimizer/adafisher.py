"""AdaFisher as a torch.optim.Optimizer: its state, and the order of a step."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, cast, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from adafisher_dist import layouts
from adafisher_dist.adamw_keys import translate, translate_group
from adafisher_dist.comm.deferred_errors import DeferredErrors
from adafisher_dist.optimizer import state_dicts
from adafisher_dist.optimizer.registry import ParameterRegistry
from adafisher_dist.settings import DEFAULTS, OF_ALL_GROUPS, normalize, preset
from adafisher_dist.state import statistics
from adafisher_dist.state.shard import Shard
from adafisher_dist.stepping import metrics
from adafisher_dist.stepping.consistency import raise_if_any_failed

if TYPE_CHECKING:
    from typing import Self

    from torch.distributed import ProcessGroup  # noqa: TID251 (a type)
    from torch.optim.optimizer import ParamsT

logger = logging.getLogger("adafisher_dist")
P = ParamSpec("P")


def _translated(init: Callable[P, None]) -> Callable[P, None]:
    """Have a constructor called with its own settings alone: what was written for Adam is translated before.

    Not in the constructor itself, where a momentum that was given could not be told from the default; and so its
    signature shows what there is to set.
    """
    signature = inspect.signature(init)

    @wraps(init)
    def construct(*values: Any, **written: Any) -> None:
        foreign = {key: value for key, value in written.items() if key not in signature.parameters}
        own = {key: value for key, value in written.items() if key not in foreign}
        given = signature.bind(*values, **own).arguments
        optimizer, params = given.pop("self"), given.pop("params")
        settings, notice = translate({**foreign, **given}, more=("process_group",))
        cast(Callable[..., None], init)(optimizer, params, **settings)
        optimizer._tell_of_betas(notice)

    return cast(Callable[P, None], construct)


class AdaFisher(Optimizer):
    """Second-order optimizer with dense diagonal blocks of the empirical Fisher, sharded over the data-parallel ranks.

    A matrix is cut into blocks of rows_per_block rows and block_size columns. For the gradient G of a block, one row g
    an output, at step t, after k Fisher updates (DESIGN.md, section 2):

        M ← μ M + (1−μ) G                       M̂ = μ M / (1 − μᵗ) + (1−μ) G  (Nesterov)
        w ← ρ w + (1−ρ) gᵀg / r, of each row    ŵ = w / (1 − ρᵏ)
        F ← ρ F + (1−ρ) mean(g gᵀ / ŵ)          F̂ = F / (1 − ρᵏ),  d = tr(F̂) / r
        S = diag(ŵ)^(−p) M̂ (F̂/d + (δ+ε) I)^(−p)
        U = polar(S), made as long as M̂ / (√V + ε) with V = ŵ diag(F̂)ᵀ / d
        Θ ← Θ − η λ Θ − η U

    Leading dimensions stack matrices, as of experts; dimensions of 1 do not count. Vectors, and tables (matrices whose
    one side is more than 8 times the other, or 4 times and at least 30,000 long: of tokens, of few outputs, LoRA's
    factors) are Adam's, element by element, with μ and ρ for its betas.

    In the replicated layout (one process, DDP, DeepSpeed ZeRO-0) each rank holds and factorises an equal run of the
    blocks, and the updates are all-gathered; under ZeRO-1 to 3 and FSDP2 a block lives where its first element is.
    N ranks train like one. Gradients must be averaged over ranks, as DDP and DeepSpeed leave them.

    A step in which a gradient is NaN, infinite, or too large to square changes nothing, on any rank; it is counted in
    `skipped_steps`, and a warning is logged. A parameter without gradient is left alone, as by AdamW.

    Args:
        params: parameters, (name, parameter) pairs, or dicts that define groups; dense real tensors of any shape, in
            float32, float64, bfloat16 or float16.
        lr: learning rate η; what suits AdamW suits here.
        momentum: decay μ of the gradient's average, in [0, 1).
        nesterov: look ahead with the newest gradient.
        fisher_decay: decay ρ of the Fisher's average, in [0, 1).
        damping: δ, relative to the block's mean curvature; it has no units.
        eps: ε, keeps the diagonal's length finite.
        block_size: columns of a block, at most. The state takes about 4·b/rows_per_block + 12 bytes an element, shared
            by all ranks. "auto": the largest that memory_budget_gb allows on these ranks, chosen at the first step.
        rows_per_block: rows of a block, at most; they share F. More rows cost less, and tell more of a block in as many
            steps; fewer follow each row's own curvature.
        block_grid: "rows" cuts each row into equal pieces; "flat" cuts every b elements, and nothing is shared.
        weight_decay: λ, decoupled.
        bias_correction: divide the averages by what zero initialisation left out.
        max_blocks: dense blocks that a parameter may have; the rest of its elements are Adam's. 0: all of them. None:
            no limit, but tables have none.
        fisher_update_freq: steps between updates of F.
        inverse_update_freq: steps between refreshes of a block's factor, in turns; shorter while the Fisher fills.
        exponent: p, 0.5, or 1.0 (natural gradient).
        grafting: "rms": as above; "none": plain F̂^(−p) m̂, with F of rows that are not weighed and no polar factor.
        fisher_dtype: torch.float32, torch.bfloat16 (half the memory, arithmetic in float32), or torch.float64
            (arithmetic in float64); or its name, as the param groups have it: "bfloat16".
        packed: store a block of F as its lower triangle: half the memory, the same results to the last bit, somewhat
            more time.
        memory_budget_gb: GB (10⁹ bytes) that a rank may use for state and buffers; for block_size="auto".
        process_group: the ranks on which the parameters are replicated; all by default. Under ZeRO, DeepSpeed's own.

    Keys of Adam and AdamW that are not listed (betas, fused, foreach, amsgrad=False, adam_w_mode=True, …) are taken
    too, here, in param groups and in JSON, where they ask for nothing that AdaFisher does not do: the first of betas
    is momentum, if that is not given, the second is left out, and one warning says so; docs/migrating.md has the rest.

    Raises:
        TypeError: a setting does not exist, or a setting or parameter has the wrong type.
        ValueError: a setting is out of bounds, or asks for what AdaFisher does not do. Either message tells all that is
            wrong with the settings.
        UnsupportedLayoutError: a parameter is laid out in a way that is not supported (also raised by `step`).
    """

    # While DeepSpeed saves its files beside a sharded checkpoint: the state dict says so, and has no state.
    _state_is_elsewhere = False
    _told_of_betas = False

    @_translated
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        nesterov: bool = True,
        fisher_decay: float = 0.97,
        damping: float = 0.01,
        eps: float = 1e-8,
        block_size: int | str = 128,
        rows_per_block: int = 64,
        block_grid: str = "rows",
        weight_decay: float = 0.01,
        bias_correction: bool = True,
        max_blocks: int | None = None,
        fisher_update_freq: int = 1,
        inverse_update_freq: int = 1,
        exponent: float = 0.5,
        grafting: str = "rms",
        fisher_dtype: torch.dtype | str = torch.float32,
        packed: bool = False,
        memory_budget_gb: float | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        arguments = locals()
        defaults = {name: arguments[name] for name in DEFAULTS}
        normalize(defaults)
        if memory_budget_gb is not None and block_size != "auto":
            raise ValueError(f'memory_budget_gb is for block_size="auto", and block_size is {block_size}.')
        self._registry = ParameterRegistry(self, process_group)
        self._reset()
        super().__init__(params, defaults)
        layouts.register_with_deepspeed(self)

    @classmethod
    def for_language_models(cls, params: ParamsT, **overrides: Any) -> Self:
        """The preset for language models: lr 6e-4 (of 124 M parameters), weight_decay 0.1."""
        return cls(params, **{**preset("language_models"), **overrides})

    @classmethod
    def for_image_classification(cls, params: ParamsT, **overrides: Any) -> Self:
        """The preset for image classification: lr 1e-3, weight_decay 0.05."""
        return cls(params, **{**preset("image_classification"), **overrides})

    def _reset(self) -> None:
        self._registry.forget_shards(self._registry.stepper.meter)
        self._consolidated: dict[int, dict[str, Tensor]] | None = None  # by id of the stored tensor
        self._elsewhere: int | None = None  # the rank that a consolidated state is on
        self._warned = False

    # ---- torch.optim's conventions ----

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group; its settings may differ from the defaults, except fisher_dtype and memory_budget_gb.

        Raises:
            TypeError: a parameter is complex, or not floating-point; a setting has the wrong type.
            ValueError: a setting is out of bounds, looks misspelt, or asks for what AdaFisher does not do.
            UnsupportedLayoutError: a parameter's layout is not supported.
        """
        notice = None
        if isinstance(param_group, dict):
            param_group, notice = translate_group(param_group, self.defaults)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            normalize(group)
            for key in OF_ALL_GROUPS:
                if group[key] != self.defaults[key]:
                    raise ValueError(
                        f"{key} is one for the whole optimizer ({self.defaults[key]}), but a param group asks for"
                        f" {group[key]}. Use two optimizers."
                    )
            self._registry.check(len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            raise
        self._registry.register(len(self.param_groups) - 1)
        self._tell_of_betas(notice)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters that have a gradient.

        Args:
            closure: evaluates the model and returns the loss, as in torch.optim.

        Returns:
            The closure's loss.

        Raises:
            RuntimeError: a gradient is sparse; the ranks' parameters, gradients, settings or plans differ; a structural
                setting (block_size, …), or a parameter's shape or device, was changed after the first step; another
                rank failed; an earlier step failed half-way; a CUDA graph is being captured.
            UnsupportedLayoutError: the layout is not supported.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = {
            id(tensor): (tensor, group)
            for group in self.param_groups
            for tensor in group["params"]
            if tensor.grad is not None
        }
        errors = DeferredErrors()
        errors.attempt(_refuse_capture)
        errors.attempt(self._registry.sync_param_groups)
        if layouts.is_called_by_torch_checkpoint():  # it wants a state to be there; the gradients are its own zeros
            errors.attempt(
                self._registry.init_missing_shards
            )  # what fails here fails again in state_dict(), on all ranks
            return loss
        errors.attempt(self._registry.drop_unused_shards)
        if not groups:
            self._warn_of_no_gradients()
        new = [tensor for tensor, _ in groups.values() if tensor not in self._registry.stepper]
        if new and layouts.is_state_init_call(self):
            return loss
        errors.attempt(partial(self._registry.sync_user_state, self._registry.stepper.shards_of(groups)))
        errors.attempt(partial(self._registry.init_shards, new))
        try:
            settings = {key: group for key, (_, group) in groups.items()}
            before = self._registry.stepper.skipped
            part = layouts.part_of_step(self)
            self._registry.stepper.step(
                settings, self._registry.ranks(), errors, part, self._registry.largest_gradient()
            )
        except Exception:
            for tensor in new:  # what was planned in this step is gone, and with it the state that had seen no step
                step = self.state.get(tensor, {}).get("step")
                if tensor not in self._registry.stepper and step is not None and not step.any():
                    del self.state[tensor]
            raise
        self._consolidated = self._elsewhere = None
        if self._registry.stepper.skipped > before:
            self._tell_of_skip(self._registry.stepper.skipped)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state as torch.optim has it; see `adafisher_dist.state` for the keys.

        In the replicated layout on several ranks a rank holds only its own blocks, so `consolidate_state_dict` must
        have been called, on all ranks, since the last step. Under ZeRO and FSDP2 it is this rank's part, and says so.

        Raises:
            RuntimeError: the state is sharded and was not consolidated.
        """
        self._registry.stepper.check_complete()
        if self._state_is_elsewhere:
            return state_dicts.without_state(super().state_dict()["param_groups"])
        self._registry.sync_param_groups()
        if layouts.is_called_by_torch_checkpoint():
            return self._state_dict_for_torch()
        self._registry.sync_user_state(self._registry.shards)
        shards = self._registry.shards
        if state_dicts.is_partial(shards) or not any(shard.storage.group.size > 1 for shard in shards):
            self._consolidated = None
            return {**super().state_dict(), state_dicts.META: state_dicts.describe(shards)}
        if self._consolidated is None:
            raise RuntimeError(
                "This rank holds only its own blocks, so its state_dict() would not be the whole state. Call"
                " optimizer.consolidate_state_dict() on all ranks first, after the last step, then state_dict() on the"
                " rank that saves."
            )
        part = "whole" if self._elsewhere is None else f"none, rank {self._elsewhere} has the whole"
        return self._packed(self._consolidated, {"format": state_dicts.STATE_DICT_FORMAT, "part": part})

    def _state_dict_for_torch(self) -> dict[str, Any]:
        """The whole state, of all parameters that can be trained, as torch's checkpoint functions carry it.

        Where parameters are sharded, as DTensors, and then all ranks have to call this. Under DDP it has to be
        consolidated, but for parameters that have seen no step. Whatever is loaded into it comes back to
        `load_state_dict`.
        """
        if self._registry.is_sharded:
            return self._packed(self._registry.as_dtensors(), state_dicts.whole())
        self._registry.init_missing_shards()
        self._registry.sync_user_state(self._registry.shards)
        if self._elsewhere is not None:
            return self._packed(
                {}, {"format": state_dicts.STATE_DICT_FORMAT, "part": f"none, rank {self._elsewhere} has the whole"}
            )
        entries = {}
        for shard, index, tensor in self._registry.current_tensors():
            if not shard.storage.on_ranks:
                entries[id(tensor)] = dict(shard.views[index])
            elif self._consolidated is not None and id(tensor) in self._consolidated:
                entries[id(tensor)] = self._consolidated[id(tensor)]
            elif not shard.stepped:
                entries[id(tensor)] = state_dicts.nothing(shard, index)
            else:
                raise RuntimeError(
                    "This rank holds only its own blocks, and torch.distributed.checkpoint asks for the whole state."
                    " Before a save call optimizer.consolidate_state_dict(to=None) on all ranks, after the last step,"
                    " and before a load optimizer.reset_state(); or give dcp.save and dcp.load"
                    " adafisher_dist.OptimizerState(model, optimizer), which is saved in parts."
                )
        return self._packed(entries, state_dicts.whole())

    def _packed(self, entries: dict[int, dict[str, Tensor]], about: dict[str, Any]) -> dict[str, Any]:
        """A state dict with these entries, by the ids of the tensors, in the place of the optimizer's own."""
        own = self.state
        try:  # the base class packs whatever `state` holds
            self.state = type(own)(dict, {tensor: entries[id(tensor)] for tensor in own if id(tensor) in entries})
            result = super().state_dict()
        finally:
            self.state = own
        return {**result, state_dicts.META: about}

    def consolidate_state_dict(self, to: int | None = 0) -> None:
        """Collect the whole state on the CPU of rank `to`, or of all ranks for None, for the next `state_dict()`.

        A collective: all ranks of the process group must call it, and `to` is a rank of that group. The copy is dropped
        by the next step. On the other ranks `state_dict()` then has an empty state, which `load_state_dict` refuses.

        Raises:
            ValueError: the group has no rank `to`.
            RuntimeError: on all ranks: one of them has no room for it; or the parameters themselves are sharded
                (ZeRO-1 to 3, FSDP2), and with them the state; or ranks did not come within the timeout of the process
                group.
        """
        self._registry.stepper.check_complete()
        self._registry.sync_param_groups()
        self._registry.sync_user_state(self._registry.shards)
        group = self._registry.ranks()
        if state_dicts.is_partial(self._registry.shards):
            raise RuntimeError(
                "consolidate_state_dict() is for parameters that are the same on every rank. These are sharded"
                f" ({state_dicts.describe(self._registry.shards)['part']}), and state_dict() is this rank's part."
            )
        if to is not None and not 0 <= to < group.size:
            raise ValueError(f"consolidate_state_dict(to={to}): the process group has ranks 0 to {group.size - 1}.")
        keep = to is None or to == group.rank
        every = [(shard, index, id(tensor)) for shard, index, tensor in self._registry.current_tensors()]
        rooms: dict[int, dict[str, Tensor]] = {}
        errors = DeferredErrors()
        if keep:
            errors.attempt(lambda: rooms.update({key: state_dicts.room(shard, index) for shard, index, key in every}))
        # Before others wait for this rank's part.
        raise_if_any_failed(group, errors, "to make room for the whole state", state_dicts.CONSOLIDATE)
        for shard, index, key in every:
            state_dicts.consolidate(shard, index, rooms.get(key))
        self._consolidated = rooms
        self._elsewhere = None if keep else to

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; bit for bit where the layout is the same.

        A whole state dict loads on any number of ranks of the replicated layout: each rank takes its own blocks.
        Settings of the param groups are restored too, as in torch.optim. Nothing changes if an error is raised.

        Raises:
            ValueError: the state does not fit the parameters, or is one rank's part of another layout.
        """
        prepared: list[Shard] = []

        def prepare_load(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            prepared.extend(self._registry.prepare_load(saved))
            return {**saved, "state": {}, "param_groups": self._registry.completed(saved["param_groups"])}

        def install(_: Optimizer) -> None:
            self._reset()
            self.defaults |= {key: self.param_groups[0][key] for key in OF_ALL_GROUPS}
            self._registry.groups = self.param_groups
            for shard in prepared:
                self._registry.install(shard)

        # As hooks, so that the user's own hooks see what they would with any other optimizer.
        before = self.register_load_state_dict_pre_hook(prepare_load)
        after = self.register_load_state_dict_post_hook(install, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle.

        Raises:
            RuntimeError: the state is sharded over ranks, or a process group was given: neither can leave the process.
        """
        if self._registry.process_group is not None or any(
            shard.storage.group.size > 1 for shard in self._registry.shards
        ):
            raise RuntimeError(
                "An AdaFisher that shares its blocks with other ranks cannot be copied or pickled: this rank holds only"
                " a part. Use consolidate_state_dict() and state_dict()."
            )
        self._registry.sync_user_state(self._registry.shards)
        # Copies: a view would drag along the whole batch that it is a part of.
        own = {tensor: {key: value.clone() for key, value in entry.items()} for tensor, entry in self.state.items()}
        return {**super().__getstate__(), "state": type(self.state)(dict, own), "skipped_steps": self.skipped_steps}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        """From copy, pickle, and torch's own load_state_dict."""
        saved = dict(saved)
        skipped = saved.pop("skipped_steps", None)
        if skipped is not None:  # a copy: the tensors are new, and its state waits in `state` for the next step
            self._registry = ParameterRegistry(self, None)
            self._reset()
            self._registry.stepper.skipped = skipped
        super().__setstate__(saved)
        if skipped is not None:
            self._registry.register_all()
            layouts.register_with_deepspeed(self, built=False)

    # ---- beyond torch.optim ----

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped for a gradient that was not finite or too large to square.

        Where a GPU's kernels find that, the host learns of it at the next call of `step`, or here; this waits for it.
        """
        self._registry.stepper.resolve_pending()
        return self._registry.stepper.skipped

    def fisher_stats(self) -> dict[str, statistics.ParameterStats]:
        """By name, for each parameter that had a gradient: blocks, Fisher updates, fallbacks counts, what computes it."""
        return {
            name: stats for shard in self._registry.shards for name, stats in statistics.fisher_stats(shard).items()
        }

    def memory_usage(self) -> dict[str, dict[str, int]]:
        """Bytes of this rank ("rank") and of all ("all"): "fisher", "momentum", "factors", "buffers", "total"."""
        return statistics.memory_usage(self._registry.shards)

    def communication_usage(self) -> dict[str, dict[str, int]]:
        """Bytes sent in a step, by kind: as planned of this rank ("rank") and of all ("all"), and as counted here.

        "weights" are new weights, where all ranks have the same ones, and "blocks" what goes to the owners of blocks
        that a boundary between ranks cuts, and back. "last_step" was counted in the last call of `step`, and has
        "verdicts" too: what the ranks agree on. DESIGN.md, "Bytes", has the formulas.
        """
        stepper = self._registry.stepper
        last = {kind: stepper.sent[kind] for kind in ("weights", "blocks", "verdicts")}
        return {**statistics.traffic(stepper.shards), "last_step": {**last, "total": sum(last.values())}}

    def report_metrics(self, callback: metrics.Callback | None, every: int = 100) -> None:
        """Have every n-th step measured: how well conditioned the blocks are, how far it went, what was sent.

        The callback gets the step and its metrics by name (`adafisher_dist.metrics.NAMES` tells what they are), on the
        first rank alone, when the next step is taken; `flush_metrics` tells of the last. An error on a rank or in the
        callback is logged once, and stops nothing. All ranks call this, with the same `every`, or the next step is an
        error on all; None ends it.

        Args:
            callback: for example `adafisher_dist.metrics.CsvLog("metrics.csv")`.
            every: steps.

        Raises:
            ValueError: `every` is not a whole number from 1 on.
        """
        self._registry.stepper.meter = None if callback is None else metrics.Meter(callback, every)

    def flush_metrics(self) -> None:
        """Tell of a measured step that no other has come after. A collective: all ranks call it."""
        stepper = self._registry.stepper
        if stepper.meter is not None:
            stepper.meter.deliver(self._registry.ranks(), stepper.skipped)

    def num_parameters(self) -> int:
        """How many parameters have state: those that have had a gradient."""
        return sum(len(shard.active) for shard in self._registry.shards)

    def reset_state(self) -> None:
        """Forget momentum, Fisher blocks and counters; settings stay. On several ranks, call it on all."""
        self.state.clear()
        self._reset()

    def get_lr(self, group: int = 0) -> float:
        """The learning rate of a param group."""
        return float(self.param_groups[group]["lr"])

    def set_lr(self, lr: float, group: int | None = None) -> None:
        """Set the learning rate of one param group, or of all.

        Raises:
            ValueError: lr is negative or not finite.
            IndexError: there is no such group.
        """
        checked = {**self.defaults, "lr": lr}
        normalize(checked)
        for param_group in self.param_groups if group is None else [self.param_groups[group]]:
            param_group["lr"] = checked["lr"]

    # ---- what is logged ----

    def _tell_of_betas(self, notice: str | None) -> None:
        if notice is not None and not self._told_of_betas:  # once, however many param groups have betas
            self._told_of_betas = True
            if self._registry.ranks().is_first:
                logger.warning("%s", notice)

    def _tell_of_skip(self, skipped: int) -> None:
        # At 1, 2, 4, 8, …: a run that only skips is not silent, and does not fill the disk either.
        if self._registry.ranks().is_first and skipped.bit_count() == 1:
            logger.warning(
                "AdaFisher skipped a step: a gradient was NaN, infinite, or too large to square (%d skipped so far)."
                " No parameter or state changed.",
                skipped,
            )

    def _warn_of_no_gradients(self) -> None:
        if not self._registry.shards and not self._warned:
            self._warned = True
            logger.warning(
                "AdaFisher.step() found no gradient on any parameter, so nothing moves. If the model was sharded or its"
                " parameters replaced (fully_shard, …) after the optimizer was built, build the optimizer last."
            )


def _refuse_capture() -> None:
    """`capturable=True` is taken, since without a graph it asks for nothing."""
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if initialized and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "AdaFisher.step() was called while a CUDA graph is captured. The host counts its steps, which a replay"
            " would not do: call step() outside of the graph."
        )
