"""The systems that are measured: this library, the uncached model, and the other libraries.

Every one computes the same steps in full where it can be told to: the published schedule of
HunyuanVideo-1.5's helpers, 25 of 50.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import dit_cache_fx
from benchmarks import peers
from benchmarks.models import Inputs, Place, Shape
from dit_cache_fx import interval_schedule


@dataclass(frozen=True)
class Plan:
    """What each system is told: compute all steps before `start` and from `end` on, and from
    `start` to `end` every `interval`-th. `inner`: what `torch.compile` compiles with."""

    steps: int
    start: int
    end: int
    interval: int
    place: Place
    inner: str = "inductor"

    @property
    def computed(self) -> frozenset[int]:
        """The steps to compute."""
        return frozenset(interval_schedule(self.steps, self.start, self.end, self.interval))

    def compiled(self, function: Any, **more: Any) -> Any:
        """`torch.compile` of a module or function."""
        return torch.compile(function, backend=self.inner, **more)


class System:
    """A model that is called once a step. `begin` comes before each generation."""

    def __init__(self, model: nn.Module, shape: Shape, plan: Plan) -> None:
        self.model, self.shape, self.plan = model, shape, plan
        self.call: Callable[..., Any] = model
        self.setup()

    def setup(self) -> None:
        """Put the cache in, compile."""

    def begin(self) -> None:
        """A new generation starts."""

    def step(self, index: int, inputs: Inputs) -> Any:
        """The model's output."""
        return self.call(**inputs)

    def computes(self, index: int) -> bool:
        """Whether that step, which has just run, was computed in full."""
        return index in self.plan.computed


# --- without a cache ---------------------------------------------------------------------------


class Uncached(System):
    def computes(self, index: int) -> bool:
        return True


class UncachedCompiled(Uncached):
    mode: str | None = None

    def setup(self) -> None:
        self.call = self.plan.compiled(self.model, mode=self.mode)


class UncachedCudaGraphs(UncachedCompiled):
    mode = "reduce-overhead"


class Limit(System):
    """What must still run on a reused step, alone."""

    def setup(self) -> None:
        self.held = self.plan.place.draw(5, *self.shape.held)
        self.call = self.plan.compiled(self.shape.rest(self.model), fullgraph=True)

    def step(self, index: int, inputs: Inputs) -> Any:
        return self.call(self.held, *(inputs[name] for name in self.shape.rest_reads))

    def computes(self, index: int) -> bool:
        return False


# --- this library ------------------------------------------------------------------------------


class Apply(System):
    """`apply`, and `torch.compile` of the result with `compile_options` unless they are None."""

    def __init__(
        self,
        model: nn.Module,
        shape: Shape,
        plan: Plan,
        strategy: str = "deepcache",
        compile_options: dict[str, Any] | None = None,
    ) -> None:
        self.strategy, self.compile_options = strategy, compile_options
        super().__init__(model, shape, plan)

    def setup(self) -> None:
        self.cached = dit_cache_fx.apply(
            self.model, self.strategy, no_cache_steps=self.plan.computed
        )
        self.call = self.cached
        if self.compile_options is not None:
            self.call = self.plan.compiled(self.cached, fullgraph=True, **self.compile_options)

    def begin(self) -> None:
        self.cached.clear_states()

    def step(self, index: int, inputs: Inputs) -> Any:
        if self.plan.place.device != "cpu":
            self.cached.cur_timestep = index  # as the helpers are told: no wait for the device
        return self.call(**inputs)


class ApplySteps(Apply):
    """`apply`, and the graph of each kind of step compiled by itself."""

    def __init__(
        self, model: nn.Module, shape: Shape, plan: Plan, mode: str | None = None, **options: Any
    ) -> None:
        self.mode = mode
        super().__init__(model, shape, plan, **options)

    def setup(self) -> None:
        super().setup()
        self.cached.compile_steps(backend=self.plan.inner, mode=self.mode)


class Backend(System):
    """`torch.compile` with this library's backend."""

    def __init__(
        self,
        model: nn.Module,
        shape: Shape,
        plan: Plan,
        strategy: str = "deepcache",
        mode: str | None = None,
    ) -> None:
        self.strategy, self.mode = strategy, mode
        super().__init__(model, shape, plan)

    def setup(self) -> None:
        self.backend = dit_cache_fx.backend(
            self.strategy, inner=self.plan.inner, mode=self.mode, no_cache_steps=self.plan.computed
        )
        self.call = torch.compile(self.model, backend=self.backend)
        self.called = self.uncached = False

    def begin(self) -> None:
        """Dynamo may have split the model so that nothing is cached."""
        self.uncached = self.called and self.backend.cache_report().calls_computed == 0
        self.backend.clear_states()

    def computes(self, index: int) -> bool:
        return self.uncached or super().computes(index)

    def step(self, index: int, inputs: Inputs) -> Any:
        if self.plan.place.device != "cpu":
            self.backend.cur_timestep = index
        self.called = True
        return self.call(**inputs)


# --- angelslim ---------------------------------------------------------------------------------


class AngelSlim(System):
    """A helper of angelslim. `form`: "eager"; "compiled": torch.compile of the wrapped model;
    "blocks": each block's forward compiled, then wrapped."""

    def __init__(
        self, model: nn.Module, shape: Shape, plan: Plan, helper: str, form: str = "eager"
    ) -> None:
        self.helper_name, self.form = helper, form
        super().__init__(model, shape, plan)

    def setup(self) -> None:
        lists = [list(blocks) for blocks in self.shape.lists(self.model)]
        if self.form == "blocks":
            for block in (block for blocks in lists for block in blocks):
                block.forward = self.plan.compiled(block.forward)
        helper = getattr(peers.angelslim_helpers(), self.helper_name)
        names = ("double_blocks", "single_blocks") if self.shape.pairs else ("single_blocks",)
        self.helper = helper(
            no_cache_steps=set(self.plan.computed), **dict(zip(names, lists, strict=False))
        )
        self.helper.enable()
        if self.form == "compiled":
            self.call = self.plan.compiled(self.model)

    def begin(self) -> None:
        self.helper.clear_states()

    def step(self, index: int, inputs: Inputs) -> Any:
        self.helper.cur_timestep = index
        return self.call(**inputs)


# --- cache-dit and diffusers -------------------------------------------------------------------


class Hooked(System):
    """A cache put into the blocks. `form`: "eager"; "compiled": torch.compile of the model;
    "regional": diffusers' `compile_repeated_blocks`."""

    def __init__(self, model: nn.Module, shape: Shape, plan: Plan, form: str = "eager") -> None:
        self.form = form
        super().__init__(model, shape, plan)

    def setup(self) -> None:
        self.put_in()
        if self.form == "compiled":
            self.call = self.plan.compiled(self.model)
        elif self.form == "regional":
            self._compile_repeated_blocks()

    def put_in(self) -> None:
        """Enable the cache."""
        raise NotImplementedError

    def _compile_repeated_blocks(self) -> None:
        if getattr(self.model, "_repeated_blocks", None):
            self.model.compile_repeated_blocks(backend=self.plan.inner)
            return
        for block in (block for blocks in self.shape.lists(self.model) for block in blocks):
            block.compile(backend=self.plan.inner)


class CacheDit(Hooked):
    """DBCache with one computed block, the fewest it takes, and the steps given."""

    def put_in(self) -> None:
        peers.require("cache_dit")
        import cache_dit

        steps = range(self.plan.steps)
        self.config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=0,
            residual_diff_threshold=1e9,
            num_inference_steps=self.plan.steps,
            steps_computation_mask=[int(i in self.plan.computed) for i in steps],
            steps_computation_policy="static",
            enable_separate_cfg=False,
        )
        cache_dit.enable_cache(self.model, cache_config=self.config)

    def begin(self) -> None:
        import cache_dit

        cache_dit.refresh_context(self.model, cache_config=self.config)


class DiffusersCache(Hooked):
    def begin(self) -> None:
        from diffusers.models.cache_utils import CacheMixin

        CacheMixin._reset_stateful_cache(self.model)
        self.context = CacheMixin.cache_context(self.model, "cond")
        self.context.__enter__()


class TaylorSeer(DiffusersCache):
    """Blocks skipped, the output layer extrapolated: what diffusers calls its lite mode.

    It counts its interval from one step later.
    """

    def computes(self, index: int) -> bool:
        plan = self.plan
        between = plan.start <= index < plan.end
        return not between or (index - plan.start - 1) % plan.interval == 0

    def put_in(self) -> None:
        from diffusers.hooks import TaylorSeerCacheConfig
        from diffusers.hooks.taylorseer_cache import apply_taylorseer_cache

        config = TaylorSeerCacheConfig(
            cache_interval=self.plan.interval,
            disable_cache_before_step=self.plan.start,
            disable_cache_after_step=self.plan.end,
            max_order=2,
            taylor_factors_dtype=self.plan.place.dtype,
            skip_predict_identifiers=[rf"{name}\.\d+" for name in self.shape.block_lists],
            cache_identifiers=[self.shape.output_layer],
        )
        apply_taylorseer_cache(self.model, config)


class FirstBlock(DiffusersCache):
    """It computes when the first block's residual has changed by more than a threshold, which is
    set here so that as many steps are computed as of the others."""

    def put_in(self) -> None:
        from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

        self.threshold = threshold_for(self.model, self.shape, self.plan)
        apply_first_block_cache(self.model, FirstBlockCacheConfig(threshold=self.threshold))
        (hook,) = self.shape.lists(self.model)[0][0]._diffusers_hook.hooks.values()
        self.state = hook.state_manager

    def computes(self, index: int) -> bool:
        return bool(self.state.get_state().should_compute)


@torch.no_grad()
def threshold_for(model: nn.Module, shape: Shape, plan: Plan) -> float:
    """The threshold with which that rule computes as many steps as the plan says, or nearly."""
    residuals: list[Tensor] = []

    def note(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        outputs = output if isinstance(output, tuple) else (output,)
        after = next(o for o in reversed(outputs) if o.shape == before.shape)
        residuals.append(after - before)
        raise _Enough

    first = shape.lists(model)[0][0]
    handle = first.register_forward_hook(note, with_kwargs=True)
    for inputs in shape.generation(plan.place, plan.steps):
        try:
            model(**inputs)
        except _Enough:
            continue
    handle.remove()
    low, high = 0.0, 10.0
    for _ in range(30):
        middle = (low + high) / 2
        if _computed(residuals, middle) > len(plan.computed):
            low = middle
        else:
            high = middle
    return high


class _Enough(Exception):
    pass


def _computed(residuals: list[Tensor], threshold: float) -> int:
    count, last = 1, residuals[0]
    for residual in residuals[1:]:
        change = (residual - last).abs().mean() / last.abs().mean()
        if change.item() > threshold:
            count, last = count + 1, residual
    return count


# --- the table's rows --------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A line of the table. `kind`: "uncached", "limit", "ours" or "peer"."""

    title: str
    kind: str
    make: Callable[[nn.Module, Shape, Plan], System]
    gpu_only: bool = False

    @property
    def caches(self) -> bool:
        """Whether anything is held from step to step."""
        return self.kind in ("ours", "peer")

    @property
    def compiles(self) -> bool:
        """Whether anything of the model is compiled."""
        return not self.title.endswith("eager")


def _unsafe_guards() -> dict[str, Any]:
    return {"options": {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}}


def _rows() -> dict[str, Row]:
    ours = "dit_cache_fx "
    rows = {
        "eager": Row("uncached, eager", "uncached", Uncached),
        "compiled": Row("uncached, torch.compile", "uncached", UncachedCompiled),
        "compiled-cudagraphs": Row(
            'uncached, torch.compile, mode="reduce-overhead"',
            "uncached",
            UncachedCudaGraphs,
            gpu_only=True,
        ),
        "limit": Row("only work that cannot be skipped, torch.compile", "limit", Limit),
        "apply": Row(ours + "apply, eager", "ours", Apply),
        "apply-compile": Row(
            ours + "apply + torch.compile(fullgraph=True)",
            "ours",
            partial(Apply, compile_options={}),
        ),
        "apply-compile-unsafe": Row(
            ours + "the same, keep_tensor_guards_unsafe",
            "ours",
            partial(Apply, compile_options=_unsafe_guards()),
        ),
        "apply-steps": Row(ours + "apply + compile_steps()", "ours", ApplySteps),
        "apply-steps-cudagraphs": Row(
            ours + 'apply + compile_steps(mode="reduce-overhead")',
            "ours",
            partial(ApplySteps, mode="reduce-overhead"),
            gpu_only=True,
        ),
        "backend": Row(ours + "backend", "ours", Backend),
        "backend-cudagraphs": Row(
            ours + 'backend, mode="reduce-overhead"',
            "ours",
            partial(Backend, mode="reduce-overhead"),
            gpu_only=True,
        ),
        "apply-compile-taylor": Row(
            ours + "taylorcache, apply + torch.compile",
            "ours",
            partial(Apply, strategy="taylorcache", compile_options={}),
        ),
        "apply-steps-taylor": Row(
            ours + "taylorcache, apply + compile_steps()",
            "ours",
            partial(ApplySteps, strategy="taylorcache"),
        ),
        "backend-taylor": Row(
            ours + "taylorcache, backend", "ours", partial(Backend, strategy="taylorcache")
        ),
    }
    for helper, name in (("DeepCacheHelper", "deepcache"), ("TaylorCacheHelper", "taylorcache")):
        for form, words in (
            ("eager", "eager"),
            ("compiled", "torch.compile(model)"),
            ("blocks", "each block compiled, then wrapped"),
        ):
            make = partial(AngelSlim, helper=helper, form=form)
            rows[f"angelslim-{name}-{form}"] = Row(f"angelslim {helper}, {words}", "peer", make)
    for key, title, system in (
        ("cache-dit", "cache-dit DBCache F1B0", CacheDit),
        ("taylorseer", "diffusers TaylorSeer", TaylorSeer),
        ("firstblock", "diffusers FirstBlockCache", FirstBlock),
    ):
        for form, words in (
            ("eager", "eager"),
            ("compiled", "torch.compile(model)"),
            ("regional", "compile_repeated_blocks"),
        ):
            rows[f"{key}-{form}"] = Row(f"{title}, {words}", "peer", partial(system, form=form))
    return rows


ROWS: dict[str, Row] = _rows()
