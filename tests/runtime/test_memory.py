"""What is held, counted by the report and, independently of it, among all living tensors."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dit_cache_fx
from dit_cache_fx import CachedModel
from dit_cache_fx.values.identity import storage_key
from tests.reference import STREAMS, BlockKey, DeepCacheReference, copied, moving_inputs
from tests.zoo import CASES, Case, case, flat
from tests.zoo.representatives import each_case, marks_of

#: strategy, its options, and how many tensors it holds for each one that leaves a run
HELD_PER_VALUE = [
    pytest.param("deepcache", {}, 1, id="deepcache"),
    pytest.param("taylorcache", {}, 3, id="taylorcache"),
    pytest.param(
        "taylorcache", {"max_order": 1, "low_freqs_order": 1, "high_freqs_order": 1}, 2, id="order1"
    ),
    pytest.param(
        "taylorcache", {"low_freqs_order": 2, "high_freqs_order": 1}, 3 + 2, id="two-bands"
    ),
]
#: by default every representative with the first, and one of them with the others
EACH_HELD = [
    pytest.param(
        c,
        *held.values,
        id=f"{held.id}-{c.name}",
        marks=marks_of(c.name, number == 0 or c.name == "FluxTransformer2DModel"),
    )
    for c in CASES
    for number, held in enumerate(HELD_PER_VALUE)
]
SMALL = "DiTTransformer2DModel"


@pytest.fixture(autouse=True, scope="module")
def _quick_gc() -> Iterator[None]:
    """What was there before these tests needs no look: collecting takes milliseconds then."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


pytestmark = pytest.mark.usefixtures("no_grad")


# --- counting ------------------------------------------------------------------------------------


def living() -> dict[int, int]:
    """Storage address -> bytes of it, for every tensor that is alive."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]
    storages = [t.untyped_storage() for t in tensors if t.layout == torch.strided]
    return {s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}


def living_tensors() -> int:
    gc.collect()
    return sum(type(each) in (Tensor, nn.Parameter) for each in gc.get_objects())


def bytes_freed_by_clearing(cached: CachedModel) -> int:
    """Bytes of all storages that `clear_states` frees: whole ones, whatever views see of them.

    What calls are known by is left out: a part of the sample and checksums, at most 3 KiB a branch.
    """
    evidence = {storage_key(t) for t in evidence_of(cached)}
    before = living()
    assert sum(before[address] for address in evidence) <= 3 * 1024 * branches_of(cached)
    cached.clear_states()
    after = living()
    freed = before.keys() - after.keys() - evidence
    return sum(before[address] for address in freed)


def branches_of(cached: CachedModel) -> int:
    return sum(len(s.branches) for s in cached._engine.call_log.tracker.sessions())


def evidence_of(cached: CachedModel) -> list[Tensor]:
    branches = [b for s in cached._engine.call_log.tracker.sessions() for b in s.branches]
    probes = [b.trajectory.sample.values for b in branches if b.trajectory.sample is not None]
    checksums = [t for b in branches for t in b.conditioning._checksums if t is not None]
    return probes + checksums


def run(model_case: Case, cached: CachedModel, steps: int = 5, **kwargs: Any) -> None:
    """A generation, of which nothing but the cache is left."""
    for step in range(steps):
        cached(**moving_inputs(model_case, step, steps, **kwargs))


def cached_model(model_case: Case, strategy: str = "deepcache", **options: Any) -> CachedModel:
    options = {"no_cache_steps": {0, 1, 3}, **options}
    return dit_cache_fx.apply(model_case.build(), strategy, **options)


# --- small models --------------------------------------------------------------------------------


class ViewBlock(nn.Module):
    """Returns a view of a larger tensor: half of what its layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 16)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return self.linear(torch.tanh(x + temb)).chunk(2, dim=-1)[0]


class ViewModel(nn.Module):
    """The smallest model: two blocks between two layers."""

    held_per_row = 6 * 8 * 4

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 8)
        self.time = nn.Linear(1, 8)
        self.blocks = nn.ModuleList([ViewBlock(), ViewBlock()])
        self.leave = nn.Linear(8, 4)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        temb = self.time(timestep[:, None, None]) + text
        x = self.enter(x)
        for block in self.blocks:
            x = block(x, temb)
        return self.leave(x)

    @staticmethod
    def inputs(timestep: float, prompt: int = 0, batch: int = 1) -> dict[str, Tensor]:
        return {
            "x": torch.randn(batch, 6, 4),
            "timestep": torch.full([batch], timestep),
            "text": torch.full([batch, 1, 8], float(prompt)),
        }


# --- what has to be held -------------------------------------------------------------------------


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class LiveOut(DeepCacheReference):
    """Finds the tensors that leave the cached runs, by changing one stored tensor at a time."""

    def __init__(self, model_case: Case, ids: Mapping[str, Collection[int]] | None = None) -> None:
        super().__init__(model_case.build(), model_case.block_lists, {0}, ids)
        self.case = model_case
        self.ids = ids or {}
        self(0, moving_inputs(model_case, 0, 8))

    def bytes_of(self) -> int:
        """Bytes of the block outputs that the model's output or a never cached block reads."""
        before, total = self._seen(), 0
        for key, stored in list(self.stored.items()):
            leaves, structure = pytree.tree_flatten(stored)
            for place, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):
                    changed = [*leaves[:place], leaf + 1, *leaves[place + 1 :]]
                    self.stored[key] = pytree.tree_unflatten(changed, structure)
                    total += nbytes(leaf) if not torch.equal(self._seen(), before) else 0
            self.stored[key] = stored
        return total

    def _seen(self) -> Tensor:
        given: list[Tensor] = []
        hooks = [
            self.block(key).register_forward_pre_hook(
                lambda *call: given.extend(_tensors(call[1:])), with_kwargs=True
            )
            for key in self._always()
        ]
        output = flat(self(1, moving_inputs(self.case, 1, 8)))
        for hook in hooks:
            hook.remove()
        return torch.cat([output, *(t.flatten().float() for t in given if not t.is_complex())])

    def _always(self) -> list[BlockKey]:
        return [(name, index) for name, ids in self.ids.items() for index in ids]


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def image_bytes(model_case: Case) -> int:
    """Bytes of the first block's tracked input: what TeaCache holds a residual of."""
    model = model_case.build()
    name = model_case.block_lists[0]
    argument = STREAMS[model_case.name][name].argument
    sizes: list[int] = []

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs[argument] if argument in kwargs else args[0]
        sizes.append(nbytes(given))

    model.get_submodule(name)[0].register_forward_pre_hook(note, with_kwargs=True)
    model(**moving_inputs(model_case, 0, 8))
    return sizes[0]


@pytest.mark.parametrize(("model_case", "strategy", "options", "per_value"), EACH_HELD)
def test_exactly_what_leaves_the_run_is_held(
    model_case: Case, strategy: str, options: dict[str, int], per_value: int
) -> None:
    cached = cached_model(model_case, strategy, **options)
    run(model_case, cached)
    expected = per_value * LiveOut(model_case).bytes_of()
    assert expected > 0
    assert cached.cache_report().bytes_held == expected
    assert bytes_freed_by_clearing(cached) == expected
    assert cached.cache_report().bytes_held == 0


@each_case
def test_teacache_holds_one_residual_of_the_image(model_case: Case) -> None:
    cached = cached_model(model_case, "teacache")
    run(model_case, cached)
    expected = image_bytes(model_case)
    assert cached.cache_report().bytes_held == expected
    assert bytes_freed_by_clearing(cached) == expected


@each_case
def test_what_leaves_each_of_several_runs_is_held(model_case: Case) -> None:
    last_list = model_case.block_lists[-1]
    ids = {last_list: {1}}
    cached = cached_model(model_case, no_cache_block_id=ids)
    run(model_case, cached)
    expected = LiveOut(model_case, ids).bytes_of()
    assert expected > LiveOut(model_case).bytes_of() / 2
    assert cached.cache_report().bytes_held == expected
    assert bytes_freed_by_clearing(cached) == expected


@each_case
def test_the_capturing_call_leaves_no_more_than_what_is_held(model_case: Case) -> None:
    """What was recorded for the capture is given up when its call is answered."""
    cached = cached_model(model_case)
    run(model_case, cached, steps=1)
    assert bytes_freed_by_clearing(cached) == LiveOut(model_case).bytes_of()
    before = living_tensors()
    run(model_case, cached, steps=2)
    cached.clear_states()
    assert living_tensors() <= before


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        pytest.param(strategy, name, marks=marks_of(name, strategy == usual))
        for name, usual in (
            ("DiTTransformer2DModel", "deepcache"),
            ("PixArtTransformer2DModel", "deepcache"),
            ("WanTransformer3DModel", "teacache"),
            ("LTXVideoTransformer3DModel", "deepcache"),
            ("ZImageTransformer2DModel", "taylorcache"),
        )
        for strategy in ("deepcache", "teacache", "taylorcache")
    ],
)
def test_a_run_of_blocks_with_one_output_takes_one_share_per_block(
    name: str, strategy: str
) -> None:
    cached = cached_model(case(name), strategy)
    run(case(name), cached)
    report = cached.cache_report()
    (blocks,) = report.blocks.values()
    assert blocks == 3
    assert report.bytes_held * blocks == report.bytes_per_block


@each_case
def test_bytes_per_block_are_those_of_a_helper_that_wraps_each_block(model_case: Case) -> None:
    cached = cached_model(model_case)
    run(model_case, cached)
    stored = LiveOut(model_case).stored
    assert cached.cache_report().bytes_per_block == sum(map(nbytes, _tensors(stored)))


# --- branches, signatures, generations ---------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        pytest.param(name, strategy, marks=marks_of(name, strategy in usual))
        for name, usual in (
            ("FluxTransformer2DModel", ("deepcache",)),
            ("OfficialHunyuanVideo15", ("teacache",)),
        )
        for strategy in ("deepcache", "teacache", "taylorcache")
    ],
)
def test_two_branches_hold_twice(name: str, strategy: str) -> None:
    one, two, named = (cached_model(case(name), strategy) for _ in range(3))
    run(case(name), one)
    for step in range(5):
        for prompt, branch in ((0, "uncond"), (1, "cond")):
            two(**moving_inputs(case(name), step, 5, prompt=prompt))
            with named.cache_context(branch):
                named(**moving_inputs(case(name), step, 5, prompt=prompt))
    once = one.cache_report().bytes_held
    assert once > 0
    assert two.cache_report().bytes_held == 2 * once
    assert named.cache_report().bytes_held == 2 * once
    assert bytes_freed_by_clearing(two) == 2 * once
    assert bytes_freed_by_clearing(named) == 2 * once


@pytest.mark.parametrize("forget", ["clear_states", "reset_states", "disable"])
def test_nothing_is_held_any_more_after(forget: str) -> None:
    cached = cached_model(case(SMALL))
    run(case(SMALL), cached)
    held = cached.cache_report().bytes_held
    before = sum(living().values())
    getattr(cached, forget)()
    assert cached.cache_report().bytes_held == 0
    assert held > 0
    assert before - sum(living().values()) >= held


@each_case
def test_the_dynamic_rule_remembers_one_signal(model_case: Case) -> None:
    """And no larger tensor that the signal is a view of."""
    cached = cached_model(
        model_case, "teacache", no_cache_steps=None, rel_l1_thresh=0.1, signal="input"
    )
    run(model_case, cached)
    image, total = image_bytes(model_case), 2 * 8  # the sum, and as it was before it began anew
    report = cached.cache_report()
    assert report.bytes_held == image
    assert report.bytes_rule == image + total
    assert bytes_freed_by_clearing(cached) == report.bytes_held + report.bytes_rule


@pytest.mark.parametrize("prompts", [1, 7])
@pytest.mark.parametrize("clears", [True, False], ids=["cleared", "not-cleared"])
def test_a_thousand_one_step_generations_do_not_grow(prompts: int, clears: bool) -> None:
    """Without `clear_states` calls at one timestep look like branches of one step: but bounded."""
    cached = dit_cache_fx.apply(ViewModel().eval(), "deepcache", no_cache_steps={0})
    tensors, held = [], []
    for number in range(1, 1001):
        cached(**ViewModel.inputs(1.0, prompt=number % prompts))
        if number % 100 == 0:
            tensors.append(living_tensors())
            held.append(cached.cache_report().bytes_held)
        if clears:
            cached.clear_states()
    assert cached.cache_report().calls_computed == 1000
    assert min(held) >= ViewModel.held_per_row
    assert max(held) <= 8 * ViewModel.held_per_row
    assert max(tensors) <= tensors[0] + 8
    assert max(tensors[5:]) <= max(tensors[:5])


def test_many_signatures_are_bounded() -> None:
    """Batch sizes 1 to 45: neither every state nor every graph is kept."""
    model = ViewModel().eval()
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0})
    held, captures = [], []
    for batch in range(1, 46):
        cached(**ViewModel.inputs(1.0, batch=batch))
        report = cached.cache_report()
        held.append(report.bytes_held / (batch * ViewModel.held_per_row))
        captures.append(len(report.captures))
    assert held[0] == 1
    assert captures[0] == 1
    assert max(held) < 12
    assert max(captures) < 40
    first = ViewModel.inputs(1.0, batch=1)
    assert torch.equal(cached(**first), model(**first))


@pytest.mark.parametrize("clears", [True, False], ids=["cleared", "not-cleared"])
def test_many_generations_hold_as_much_as_one(clears: bool) -> None:
    cached = cached_model(case(SMALL), "taylorcache")
    for prompt in range(20):  # what a number of branches are known by stays
        run(case(SMALL), cached, prompt=prompt)
    once, tensors = cached.cache_report().bytes_held, living_tensors()
    for number in range(40):
        if clears:
            cached.clear_states()
        run(case(SMALL), cached, prompt=number % 5)
        assert cached.cache_report().bytes_held == once
    assert living_tensors() <= tensors


# --- views ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["deepcache", "taylorcache"])
def test_a_held_view_does_not_keep_a_larger_tensor_alive(strategy: str) -> None:
    model = ViewModel().eval()
    order = {"max_order": 0} if strategy == "taylorcache" else {}
    cached = dit_cache_fx.apply(model, strategy, no_cache_steps={0}, **order)
    for value in (1.0, 0.5):
        cached(**ViewModel.inputs(value))
    assert cached.cache_report().bytes_held == ViewModel.held_per_row
    assert bytes_freed_by_clearing(cached) == ViewModel.held_per_row


def test_the_callers_tensors_are_not_kept_alive() -> None:
    cached = cached_model(case(SMALL))
    inputs = moving_inputs(case(SMALL), 0, 5)
    large = torch.zeros(1_000_000)
    inputs["hidden_states"] = large[: inputs["hidden_states"].numel()].view(1, 4, 8, 8)
    cached(**inputs)
    address = large.untyped_storage().data_ptr()
    assert address in living()
    del large, inputs
    assert address not in living()


def test_what_is_held_is_not_what_the_caller_gets() -> None:
    """Changing an output in place changes no later one."""
    small = case(SMALL)
    cached, other = cached_model(small), cached_model(small)
    for step in range(5):
        inputs = moving_inputs(small, step, 5)
        (output,) = other(**inputs)
        expected = copied(output)
        output.zero_()
        assert torch.equal(cached(**inputs)[0], expected)
