"""AdaFisher as a torch.optim.Optimizer: its settings, and the order of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from adafisher_dist import layouts
from adafisher_dist.adamw_keys import translated
from adafisher_dist.blocks import cost
from adafisher_dist.comm.deferred_errors import DeferredErrors
from adafisher_dist.layouts.deepspeed_wrappers import PartOfStep, register_with_deepspeed
from adafisher_dist.optimizer.registry import ParameterRegistry
from adafisher_dist.optimizer.sharded_optimizer import ShardedOptimizer
from adafisher_dist.settings import DEFAULTS, normalize, preset
from adafisher_dist.state import statistics
from adafisher_dist.stepping import metrics
from adafisher_dist.stepping.interrupts import waiting_interrupts

if TYPE_CHECKING:
    from typing import Self

    from torch.distributed import ProcessGroup  # noqa: TID251 (a type)
    from torch.optim.optimizer import ParamsT


class AdaFisher(ShardedOptimizer):
    """Second-order optimizer with dense diagonal blocks of the empirical Fisher.

    The blocks are sharded over the data-parallel ranks. A matrix is cut into blocks of
    rows_per_block rows and block_size columns. For the gradient G of a block, whose rows g have r
    elements each, at step t, after k Fisher updates (DESIGN.md, section 2):

        M ← μ M + (1−μ) G                       M̂ = μ M / (1 − μᵗ) + (1−μ) G  (Nesterov)
        w ← ρ w + (1−ρ) gᵀg / r, of each row    ŵ = w / (1 − ρᵏ)
        F ← ρ F + (1−ρ) mean(g gᵀ / ŵ)          F̂ = F / (1 − ρᵏ),  d = tr(F̂) / r
        S = diag(ŵ)^(−p) M̂ (F̂/d + (δ+ε) I)^(−p)
        U = diag(√ŵ / (√ŵ + ε)) polar(S), scaled to the norm of M̂ / (√V + ε), V = ŵ diag(F̂)ᵀ / d
        Θ ← Θ − η λ Θ − η U

    Leading dimensions stack matrices, as of experts; dimensions of 1 do not count. Vectors, and
    tables (matrices whose one side is more than 8 times the other, or 4 times and 30,000 to 33,000
    long: of tokens, of few outputs, LoRA's factors) are updated elementwise, as by Adam, with μ and
    ρ for its betas.

    In the replicated layout (one process, DDP, DeepSpeed ZeRO-0) each rank holds and factorises an
    equal run of the blocks, and the new weights are all-gathered; under ZeRO-1 to 3 and FSDP2 a
    block lives on a rank that stores a part of it. N ranks train like one. Gradients must be
    averaged over ranks, as DDP and DeepSpeed leave them.

    A step in which a gradient is NaN, infinite, or too large to square changes nothing, on any
    rank; it is counted in `skipped_steps`, and a warning is logged. A parameter without gradient is
    left alone, as by AdamW.

    Args:
        params: parameters, (name, parameter) pairs, or dicts that define groups; dense real tensors
            of any shape, in float32, float64, bfloat16 or float16 (frozen ones in any real dtype).
        lr: learning rate η; what suits AdamW suits here.
        momentum: decay μ of the gradient's average, in [0, 1).
        nesterov: look ahead with the newest gradient.
        fisher_decay: decay ρ of the Fisher's average, in [0, 1).
        damping: δ, relative to the block's mean curvature; it has no units.
        eps: Adam's ε: added to the root of a second moment, and to `damping`.
        block_size: columns of a block, at most. The state takes about
            4·block_size/rows_per_block + 4 bytes an element (4·block_size + 4 with
            block_grid="flat"), and 8 for elements without blocks, shared out over all ranks.
            "auto": the largest that memory_budget_gb allows on these ranks, chosen at the first
            step.
        rows_per_block: rows of a block, at most; they share F. With more rows each block sees more
            samples per step, and costs less; with fewer, F follows each row's own curvature.
        block_grid: "rows" cuts each row into equal pieces; "flat" cuts the flattened
            parameter every block_size elements, each a vector with an F of its own.
        weight_decay: λ, decoupled.
        bias_correction: divide the averages by 1 − decayᵗ, since they begin at zero.
        max_blocks: dense blocks of a parameter, at most; elements past them are updated
            elementwise, as by Adam. 0: all of them. None: no limit, but tables have none.
        fisher_update_freq: steps between updates of F with grafting="none"; else F, by which each
            update is bounded, is updated in every step.
        inverse_update_freq: steps between refreshes of a block's (F̂/d + (δ+ε) I)^(−p); fewer
            in the first steps, when F changes most. Above 1 it is kept, and each step refreshes
            some of the blocks.
        exponent: p, 0.5, or 1.0 (natural gradient).
        grafting: "rms": as above; "none": plain F̂^(−p) m̂, with F averaged without dividing the
            rows by √ŵ, and no polar factor.
        fisher_dtype: torch.float32, torch.bfloat16 (half the memory, arithmetic in float32), or
            torch.float64 (arithmetic in float64); or its name, as the param groups have it:
            "bfloat16".
        packed: store a block of F as its lower triangle: half the memory, the same results to the
            last bit, somewhat more time.
        stochastic_rounding: round new weights in bfloat16 up or down by chance, so that their mean
            is exact and small updates are not lost; all of a group must be in bfloat16.
        memory_budget_gb: GB (10⁹ bytes) that a rank may use for state and buffers; for
            block_size="auto".
        process_group: the ranks on which the parameters are replicated; all by default. Under ZeRO,
            DeepSpeed's own.

    Keys of Adam and AdamW that are not listed (betas, fused, foreach, amsgrad=False,
    adam_w_mode=True, …) are taken too, here, in param groups and in JSON, where they ask for
    nothing that AdaFisher does not do: the first of betas is momentum, if that is not given, the
    second is left out, and one warning says so; docs/migrating.md has the rest.

    Raises:
        TypeError: a setting does not exist, or a setting or parameter has the wrong type.
        ValueError: a setting is out of bounds, or asks for what AdaFisher does not do. Either
            message reports all mistakes in the settings.
        UnsupportedLayoutError: a parameter is laid out in a way that is not supported (also raised
            by `step`).
    """

    @translated
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
        stochastic_rounding: bool = False,
        memory_budget_gb: float | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        arguments = locals()
        defaults = {name: arguments[name] for name in DEFAULTS}
        normalize(defaults)
        if memory_budget_gb is not None and block_size != "auto":
            raise ValueError(
                f'memory_budget_gb is for block_size="auto", and block_size is {block_size}. Set that, or leave it out.'
            )
        super().__init__(params, defaults, process_group)
        register_with_deepspeed(self)

    @classmethod
    def for_language_models(cls, params: ParamsT, **overrides: Any) -> Self:
        """The preset for language models: lr 6e-4 (of 124 M parameters), weight_decay 0.1."""
        return cls(params, **{**preset("language_models"), **overrides})

    @classmethod
    def for_image_classification(cls, params: ParamsT, **overrides: Any) -> Self:
        """The preset for image classification: lr 1e-3, weight_decay 0.05."""
        return cls(params, **{**preset("image_classification"), **overrides})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    # Called by compiled code the step is one graph break: what the host counts, and what the ranks
    # agree on, is no graph. As torch.compiler.disable, which would import torch._dynamo here.
    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters that have a gradient.

        Args:
            closure: evaluates the model and returns the loss, as in torch.optim.

        Returns:
            The closure's loss.

        Raises:
            RuntimeError: a gradient is sparse; the ranks' parameters, gradients, settings or plans
                differ; a parameter's shape or device was changed after the first step; another
                rank failed; an earlier step failed half-way; a CUDA graph is being captured.
            TypeError, ValueError: a setting of a param group is wrong, or a structural one
                (block_size, …) was changed after the first step.
            UnsupportedLayoutError: the layout is not supported; it is called in DDP's `join()`, in
                which ranks may run out of batches.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        registry, errors = self._registry, DeferredErrors()
        part = layouts.part_of_step(self)
        with _restored_after_an_error(registry, part):
            errors.attempt(_refuse_capture)
            if layouts.is_called_by_torch_checkpoint():  # it wants a state to be there; the gradients are its own zeros
                # What fails here fails again in state_dict(), on all ranks.
                errors.attempt(registry.sync_param_groups)
                errors.attempt(registry.init_missing_shards)
                return loss
            groups, new = registry.begin_step(errors)
            uneven = errors.result(lambda: registry.join_contexts.problem(new), None)
            if uneven is not None:
                raise uneven
            if not groups:
                self._notices.no_gradients()
            if new and layouts.is_state_init_call(self):
                return loss
            if new:
                errors.attempt(self._notices.tables)
            errors.attempt(lambda: registry.sync_user_state(registry.stepper.shards_of(groups)))
            errors.attempt(lambda: registry.init_shards(new))
            before, ranks = registry.stepper.skipped, registry.ranks()
            # Several ranks may have to be freed from a wait, and after one of several parts a step
            # is half.
            with waiting_interrupts(ranks.total_size == 1 and (part is None or part.calls == 1)):
                registry.stepper.step(groups, ranks, errors, part, registry.of_all_parts)
        self._consolidated = None
        if registry.stepper.skipped > before:
            self._notices.skipped(registry.stepper.skipped)
        return loss

    def fisher_stats(self) -> dict[str, statistics.ParameterStats]:
        """By name, for each parameter that had a gradient: blocks, Fisher updates, fallbacks."""
        return {
            name: stats for shard in self._registry.shards for name, stats in statistics.fisher_stats(shard).items()
        }

    def memory_usage(self) -> dict[str, dict[str, int]]:
        """Bytes of this rank ("rank") and of all ("all"), by kind.

        The kinds are "fisher", "momentum", "factors" and "buffers"; "total" is their sum.
        """
        return statistics.usage(self._registry.shards, cost.MEMORY_KINDS, cost.memory)

    def communication_usage(self) -> dict[str, dict[str, int]]:
        """Bytes sent in a step, by kind, as planned and as counted.

        "rank" and "all" are planned, for this rank and for all; "last_step" was counted here in the
        last call of `step`. "weights" are new weights, where all ranks have the same ones; "blocks"
        is what goes to the owners of blocks that a boundary between ranks cuts, and back;
        "verdicts", counted only, is what the ranks agree on. docs/how_it_works.md has the formulas.
        """
        stepper = self._registry.stepper
        last = {kind: stepper.sent[kind] for kind in ("weights", "blocks", "verdicts")}
        planned = statistics.usage(stepper.shards, cost.TRAFFIC_KINDS, cost.traffic)
        return {**planned, "last_step": {**last, "total": sum(last.values())}}

    def report_metrics(self, callback: metrics.Callback | None, every: int = 100) -> None:
        """Measure every n-th step: conditioning of the blocks, size of the update, bytes sent.

        On the first rank alone the callback gets the step and its metrics by name
        (`adafisher_dist.metrics.NAMES` describes them), when the next step is taken;
        `flush_metrics` reports the last measured one. An error on a rank or in the callback is
        logged once, and stops nothing. All ranks call this, with the same `every`, or the next step
        is an error on all; None ends it.

        Args:
            callback: for example `adafisher_dist.metrics.CsvLog("metrics.csv")`.
            every: steps.

        Raises:
            ValueError: `every` is not a whole number from 1 on.
        """
        self._registry.stepper.meter = None if callback is None else metrics.Meter(callback, every)

    def flush_metrics(self) -> None:
        """Report the last measured step now, and not at the next one. All ranks call it."""
        stepper = self._registry.stepper
        if stepper.meter is not None:
            stepper.resolve_pending()
            stepper.meter.deliver(self._registry.ranks(), stepper.skipped)

    def num_parameters(self) -> int:
        """How many parameters have state: those that have had a gradient."""
        return sum(len(shard.active) for shard in self._registry.shards)

    def get_lr(self, group: int = 0) -> float:
        """The learning rate of a param group."""
        return float(self.param_groups[group]["lr"])

    def set_lr(self, lr: float | Tensor, group: int | None = None) -> None:
        """Set the learning rate of one param group, or of all.

        Where a group has the `initial_lr` of a scheduler, as after a load, that is set too, so that
        a scheduler which is built afterwards starts from `lr` (but for those with rates of their
        own, as OneCycleLR). One that is attached already goes on from its own rates.

        Raises:
            ValueError: lr is negative or not finite.
            IndexError: there is no such group.
        """
        checked = {**self.defaults, "lr": lr}
        normalize(checked)
        for param_group in self.param_groups if group is None else [self.param_groups[group]]:
            for key in ("lr", "initial_lr"):
                if key in param_group:  # a tensor of its own each, since schedulers change it in place
                    param_group[key] = checked["lr"].clone() if isinstance(lr, Tensor) else checked["lr"]


@contextmanager
def _restored_after_an_error(registry: ParameterRegistry, part: PartOfStep | None) -> Iterator[None]:
    """Undo what is left of a step, or of a part of a wrapper's, that fails, as by Ctrl-C.

    DeepSpeed shows some of the param groups for the call, or puts parameters into them, and undoes
    that only where the call returns.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception):
            registry.forget_unstepped()
        if part is not None:
            registry.optimizer.param_groups = registry.groups
            for group in registry.groups if part.empties_groups else ():
                group["params"] = []
        raise


def _refuse_capture() -> None:
    """`capturable=True` is taken, since without a graph it asks for nothing."""
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if initialized and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "AdaFisher.step() was called while a CUDA graph is captured. The host counts its steps, which a replay"
            " would not do: call step() outside of the graph."
        )
