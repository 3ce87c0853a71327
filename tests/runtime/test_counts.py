"""What runs on a computed and on a reused step, counted with hooks on the user's own modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dit_cache_fx
from dit_cache_fx import CachedModel, interval_schedule
from tests.reference import (
    STREAMS,
    BlockKey,
    DeepCacheReference,
    Reference,
    TaylorReference,
    TeaCacheReference,
    moving_inputs,
)
from tests.zoo import CASES, Case, case, flat
from tests.zoo.representatives import each_case, marks_of

STEPS = 12
COMPUTED = interval_schedule(STEPS, 2, 10, 3)
STRATEGIES = ("deepcache", "teacache", "taylorcache")

#: each model with one strategy in turn by default
each_pair = pytest.mark.parametrize(
    ("model_case", "strategy"),
    [
        pytest.param(
            c,
            strategy,
            id=f"{c.name}-{strategy}",
            marks=marks_of(c.name, turn == number % len(STRATEGIES)),
        )
        for number, c in enumerate(CASES)
        for turn, strategy in enumerate(STRATEGIES)
    ],
)


pytestmark = pytest.mark.usefixtures("no_grad")


# --- counting ------------------------------------------------------------------------------------

Calls = Counter[str]


def counted(modules: Mapping[str, nn.Module]) -> Calls:
    """Counts the calls of modules from now on, by name."""
    calls: Calls = Counter()
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


def leaves_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every module without parts."""
    return {n: m for n, m in model.named_modules() if not list(m.children())}


def blocks_of(model: nn.Module, model_case: Case) -> dict[str, nn.Module]:
    """Every trunk block, by its path."""
    lists = {name: model.get_submodule(name) for name in model_case.block_lists}
    return {f"{n}.{i}": block for n, blocks in lists.items() for i, block in enumerate(blocks)}


def generation(model_case: Case, cached: CachedModel, calls: Calls, steps: int) -> list[Calls]:
    """What was called on each step."""
    per_step = []
    for step in range(steps):
        calls.clear()
        cached(**moving_inputs(model_case, step, steps))
        per_step.append(Counter(calls))
    return per_step


@cache
def counts(model_case: Case, strategy: str, always: BlockKey | None = None) -> list[Calls]:
    """What a generation calls on each step, of blocks and layers; block `always` is not cached."""
    model = model_case.build()
    calls = counted(leaves_of(model) | blocks_of(model, model_case))
    ids = None if always is None else {always[0]: {always[1]}}
    cached = dit_cache_fx.apply(model, strategy, no_cache_steps=COMPUTED, no_cache_block_id=ids)
    per_step = generation(model_case, cached, calls, STEPS)
    actions = [record.action == "computed" for record in cached.cache_report().timeline]
    assert actions == [step in COMPUTED for step in range(STEPS)]
    return per_step


@cache
def counts_of_the_model(model_case: Case) -> Calls:
    """What one call of the uncached model calls."""
    model = model_case.build()
    calls = counted(leaves_of(model) | blocks_of(model, model_case))
    model(**moving_inputs(model_case, 0, STEPS))
    return calls


def blocks_in(calls: Calls, model_case: Case) -> dict[str, int]:
    lists = model_case.block_lists
    return {n: c for n, c in calls.items() if n.rpartition(".")[0] in lists}


def layers_on_a_reused_step(
    model_case: Case, strategy: str, always: BlockKey | None = None
) -> set[str]:
    """The layers that run on every reused step; they are the same on each."""
    per_step = counts(model_case, strategy, always)
    reused = [set(ran) for step, ran in enumerate(per_step) if step not in COMPUTED]
    assert all(ran == reused[0] for ran in reused)
    return reused[0] & set(leaves_of(model_case.build()))


# --- blocks --------------------------------------------------------------------------------------


@each_pair
def test_each_cached_block_runs_once_for_each_computed_step(
    model_case: Case, strategy: str
) -> None:
    """The first call captures the model: it runs no block a second time."""
    every_block = dict.fromkeys(blocks_of(model_case.build(), model_case), 1)
    for step, ran in enumerate(counts(model_case, strategy)):
        assert blocks_in(ran, model_case) == (every_block if step in COMPUTED else {}), step


@each_pair
def test_a_never_cached_block_runs_on_every_step(model_case: Case, strategy: str) -> None:
    every_block = dict.fromkeys(blocks_of(model_case.build(), model_case), 1)
    last_list = model_case.block_lists[-1]
    for step, ran in enumerate(counts(model_case, strategy, (last_list, 1))):
        expected = every_block if step in COMPUTED else {f"{last_list}.1": 1}
        assert blocks_in(ran, model_case) == expected, step


@each_case
def test_a_second_generation_runs_as_many_blocks_as_the_first(model_case: Case) -> None:
    model = model_case.build()
    calls = counted(blocks_of(model, model_case))
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0, 2})
    first = generation(model_case, cached, calls, steps=4)
    assert generation(model_case, cached, calls, steps=4) == first
    assert [len(ran) > 0 for ran in first] == [True, False, True, False]


@each_case
def test_both_branches_of_guidance_run_each_block_once(model_case: Case) -> None:
    model = model_case.build()
    blocks = blocks_of(model, model_case)
    calls = counted(blocks)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0, 2})
    for step in range(4):
        for prompt in (0, 1):
            calls.clear()
            cached(**moving_inputs(model_case, step, 4, prompt=prompt))
            assert calls == (dict.fromkeys(blocks, 1) if step in (0, 2) else {}), (step, prompt)


# --- layers --------------------------------------------------------------------------------------


@each_pair
def test_a_computed_step_runs_each_layer_as_often_as_the_model(
    model_case: Case, strategy: str
) -> None:
    """From the second computed step on: the first one also captures and checks."""
    expected = counts_of_the_model(model_case)
    for step in sorted(COMPUTED)[1:]:
        assert counts(model_case, strategy)[step] == expected, step


REFERENCES: dict[str, Callable[[Case, nn.Module, Any], Reference]] = {
    "deepcache": lambda c, m, ids: DeepCacheReference(m, c.block_lists, {0}, ids),
    "taylorcache": lambda c, m, ids: TaylorReference(m, c.block_lists, {0}, ids),
    "teacache": lambda c, m, ids: TeaCacheReference(STREAMS[c.name], m, c.block_lists, {0}, ids),
}


class Dependencies:
    """Which layers matter on a reused step, found by changing each one's output.

    The reference has its cached blocks' results from step 0; at step 1 one layer at a time gets
    its output changed. What is looked at (`probe`) changes with it, or the layer is not needed.
    """

    def __init__(
        self, model_case: Case, strategy: str, ids: Mapping[str, Collection[int]] | None = None
    ) -> None:
        self.model_case = model_case
        self.reference = REFERENCES[strategy](model_case, model_case.build(), ids or {})
        self.model = self.reference.model
        self.always = always_running(self.model, model_case, self.reference.runs)
        self.reference(0, moving_inputs(model_case, 0, 8))

    def needed(self, tracked_inputs: bool = False) -> set[str]:
        """The layers whose output changes the model's, or what a never cached block is given.

        `tracked_inputs`: or what the first block of a run is given as the tracked stream.
        """
        leaves = leaves_of(self.model)
        before, called = self._probe(tracked_inputs), self._called(leaves)
        inside = {n for n in called if n.startswith(tuple(f"{b}." for b in self.always))}
        outside = called - inside
        changing = {n for n in outside if self._changes(leaves[n], before, tracked_inputs)}
        return inside | changing

    def _called(self, leaves: Mapping[str, nn.Module]) -> set[str]:
        names: set[str] = set()
        with hooks(leaves, lambda name, _: names.add(name)):
            self._run()
        return names

    def _changes(self, leaf: nn.Module, before: Tensor, tracked_inputs: bool) -> bool:
        with hooks({"leaf": leaf}, lambda _, output: pytree.tree_map(_changed, output)):
            return not torch.equal(self._probe(tracked_inputs), before)

    def _probe(self, tracked_inputs: bool) -> Tensor:
        """The model's output, the never cached blocks' inputs, the tracked streams."""
        given: list[Tensor] = []
        blocks = [self.model.get_submodule(name) for name in self.always]
        pre_hooks = [
            block.register_forward_pre_hook(
                lambda *call: given.extend(_tensors(call[1:])), with_kwargs=True
            )
            for block in blocks
        ]
        output = self._run()
        for hook in pre_hooks:
            hook.remove()
        if tracked_inputs:
            assert isinstance(self.reference, TeaCacheReference)
            given += self.reference.start.values()
        return torch.cat([flat(output), *map(_numbers, given)])

    def _run(self) -> Any:
        return self.reference(1, moving_inputs(self.model_case, 1, 8))


def always_running(
    model: nn.Module, model_case: Case, runs: Collection[Collection[BlockKey]]
) -> list[str]:
    """The paths of the blocks that are in no run."""
    cached = {f"{name}.{index}" for run in runs for name, index in run}
    return [path for path in blocks_of(model, model_case) if path not in cached]


@contextmanager
def hooks(modules: Mapping[str, nn.Module], see: Callable[[str, Any], Any]) -> Iterator[None]:
    """Show the output of each module to `see`, whose answer (if any) replaces it."""

    def hook_of(name: str) -> Callable[..., Any]:
        return lambda *call: see(name, call[-1])

    handles = [m.register_forward_hook(hook_of(name)) for name, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _numbers(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.flatten().float()


def _changed(value: Any) -> Any:
    """Another value in the place of a layer's output, far enough to be seen anywhere."""
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return value
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    return value + 0.5 * noise.to(value.dtype)


@each_case
@pytest.mark.parametrize("strategy", ["deepcache", "taylorcache"])
def test_a_reused_step_runs_exactly_the_layers_that_matter(model_case: Case, strategy: str) -> None:
    needed = Dependencies(model_case, strategy).needed()
    assert layers_on_a_reused_step(model_case, strategy) == needed
    assert 0 < len(needed) < len(leaves_of(model_case.build())) / 3


#: layers that make other rows of a tensor that goes through a layer (a dropout) as a whole
BESIDE_THE_STREAM = {"CogVideoXTransformer3DModel": {"patch_embed.text_proj"}}


@each_case
def test_a_reused_step_of_teacache_also_runs_what_makes_its_stream(model_case: Case) -> None:
    """What makes rows of the stream that the output does not show may run: they are one tensor."""
    dependencies = Dependencies(model_case, "teacache")
    ran = layers_on_a_reused_step(model_case, "teacache")
    shown, allowed = dependencies.needed(), dependencies.needed(tracked_inputs=True)
    assert shown <= ran <= allowed | BESIDE_THE_STREAM.get(model_case.name, set())
    assert ran > Dependencies(model_case, "deepcache").needed()


@each_pair
def test_a_reused_step_with_a_never_cached_block_runs_what_that_block_needs(
    model_case: Case, strategy: str
) -> None:
    last_list = model_case.block_lists[-1]
    dependencies = Dependencies(model_case, strategy, {last_list: {1}})
    ran = layers_on_a_reused_step(model_case, strategy, (last_list, 1))
    tracked = strategy == "teacache"
    beside = BESIDE_THE_STREAM.get(model_case.name, set()) if tracked else set()
    assert dependencies.needed() <= ran <= dependencies.needed(tracked_inputs=tracked) | beside
    assert any(name.startswith(f"{last_list}.1.") for name in ran)


BY_HAND = {
    # the timestep's embedding feeds the final norm; patches, text and rotary tables only blocks
    ("FluxTransformer2DModel", "deepcache"): {
        "time_text_embed.time_proj",
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.act",
        "time_text_embed.timestep_embedder.linear_2",
        "time_text_embed.guidance_embedder.linear_1",
        "time_text_embed.guidance_embedder.act",
        "time_text_embed.guidance_embedder.linear_2",
        "time_text_embed.text_embedder.linear_1",
        "time_text_embed.text_embedder.act_1",
        "time_text_embed.text_embedder.linear_2",
        "norm_out.silu",
        "norm_out.linear",
        "norm_out.norm",
        "proj_out",
    },
    # no text refiner, no byT5 mapper, no vision projection, no patch embedding
    ("OfficialHunyuanVideo15", "deepcache"): {
        "time_in.mlp.0",
        "time_in.mlp.1",
        "time_in.mlp.2",
        "final_layer.mod.linear",
        "final_layer.linear",
    },
    # beside that, the patch embedding
    ("OfficialHunyuanVideo15", "teacache"): {
        "img_in",
        "time_in.mlp.0",
        "time_in.mlp.1",
        "time_in.mlp.2",
        "final_layer.mod.linear",
        "final_layer.linear",
    },
    # the final layer takes the embedded timestep, from before the blocks' own projection of it
    ("LTXVideoTransformer3DModel", "taylorcache"): {
        "time_embed.emb.time_proj",
        "time_embed.emb.timestep_embedder.linear_1",
        "time_embed.emb.timestep_embedder.act",
        "time_embed.emb.timestep_embedder.linear_2",
        "norm_out",
        "proj_out",
    },
}


@pytest.mark.parametrize(("name", "strategy"), BY_HAND, ids=["-".join(key) for key in BY_HAND])
def test_layers_of_a_reused_step_written_down_by_hand(name: str, strategy: str) -> None:
    assert layers_on_a_reused_step(case(name), strategy) == BY_HAND[name, strategy]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("FluxTransformer2DModel", "context_embedder"),
        ("FluxTransformer2DModel", "pos_embed"),
        ("HunyuanVideoTransformer3DModel", "context_embedder.proj_in"),
        ("ZImageTransformer2DModel", "context_refiner.0.attention.to_q"),
        ("OfficialHunyuanVideo15", "txt_in.blocks.0.proj"),
        ("OfficialHunyuanVideo15", "byt5_in.fc1"),
    ],
)
def test_the_prologue_runs_on_computed_steps_only(name: str, layer: str) -> None:
    model = case(name).build()
    calls = counted({layer: model.get_submodule(layer)})
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=COMPUTED)
    ran = generation(case(name), cached, calls, STEPS)
    assert [step for step in range(STEPS) if ran[step]] == sorted(COMPUTED)
