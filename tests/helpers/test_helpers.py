"""The helpers for code that was written for AngelSlim's: the loop as documented, and their life."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_cache_fx
from dit_cache_fx import CaptureError, DitCacheError, OptionError, interval_schedule
from dit_cache_fx.helpers import CacheHelper, DeepCacheHelper, TaylorCacheHelper, TeaCacheHelper
from tests.reference import DeepCacheReference, moving_inputs
from tests.toys import TOY, NestedBlocksDiT, ToyDiT, make, runs_of
from tests.zoo import case, flat

STEPS = 8
#: in the form of HunyuanVideo-1.5's own schedule: a list
SCHEDULE = sorted(interval_schedule(STEPS, 2, 7, 3))
KINDS = {
    "deepcache": DeepCacheHelper,
    "teacache": TeaCacheHelper,
    "taylorcache": TaylorCacheHelper,
}


class Pipeline:
    """What matters of HunyuanVideo-1.5's pipeline: it holds the transformer and calls it itself."""

    def __init__(self, transformer: nn.Module, name: str) -> None:
        self.transformer = transformer
        self.case = case(name)

    def apply_infer_optimization(self, kind: Any, **options: Any) -> None:
        self.cache_helper = kind(
            double_blocks=self.transformer.double_blocks, no_cache_steps=SCHEDULE, **options
        )
        self.cache_helper.enable()

    @torch.no_grad()
    def __call__(self) -> Tensor:
        cache_helper = getattr(self, "cache_helper", None)
        if cache_helper is not None:
            cache_helper.clear_states()
        given = self.case.inputs(0.0)
        latents = given["hidden_states"][:, :4]
        cond_latents = given["hidden_states"][:, 4:]
        timesteps = torch.tensor(self.case.timesteps(STEPS))
        for i, t in enumerate(timesteps):
            if cache_helper is not None:
                cache_helper.cur_timestep = i
            latent_model_input = torch.cat([torch.concat([latents, cond_latents], dim=1)] * 2)
            rows = self.case.inputs(0.0, batch=2)
            output = self.transformer(
                latent_model_input,
                t.repeat(2),
                rows["text_states"],
                None,
                rows["encoder_attention_mask"],
                timestep_r=None,
                vision_states=rows["vision_states"],
                mask_type=rows["mask_type"],
                guidance=None,
                return_dict=False,
                extra_kwargs=rows["extra_kwargs"],
            )
            uncond, text = output[0].chunk(2)
            latents = latents - (uncond + 6.0 * (text - uncond)) / STEPS
        return latents


def toy(depth: int = 3) -> nn.Module:
    return make(ToyDiT, depth=depth)


def generate(
    called: Callable[..., Any],
    helper: CacheHelper | None = None,
    steps: int = 6,
    start: int = 0,
    **options: Any,
) -> list[Tensor]:
    """The outputs of a denoising loop."""
    outputs = []
    if helper is not None:
        helper.clear_states()
    with torch.no_grad():
        for step in range(steps):
            if helper is not None:
                helper.cur_timestep = start + step
            outputs.append(flat(called(**moving_inputs(TOY, step, steps, **options))))
    return outputs


def same(got: Collection[Tensor], want: Collection[Tensor]) -> bool:
    return len(got) == len(want) and all(map(torch.equal, got, want))


@functools.cache
def expected(strategy: str, steps: frozenset[int], prompt: int, **options: Any) -> list[Tensor]:
    """What a cached toy gives."""
    cached = dit_cache_fx.apply(toy(), strategy, no_cache_steps=steps, **options)
    return generate(cached, prompt=prompt)


def wanted(*steps: int, strategy: str = "deepcache", prompt: int = 0, **options: Any) -> Any:
    return expected(strategy, frozenset(steps), prompt, **options)


@functools.cache
def uncached() -> list[Tensor]:
    return generate(toy())


def deepcache(model: nn.Module, steps: Collection[int], **options: Any) -> Any:
    return dit_cache_fx.apply(model, "deepcache", no_cache_steps=steps, **options)


# --- the loop as documented -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        pytest.param("OfficialHunyuanVideo15", "deepcache", marks=pytest.mark.exhaustive),
        ("OfficialHunyuanVideo15", "teacache"),
        ("OfficialHunyuanVideo15Single", "taylorcache"),
    ],
)
def test_documented_integration(name: str, strategy: str) -> None:
    """Only the import is another one; single blocks that were not given are not cached."""
    pipe = Pipeline(case(name).build(), name)
    blocks = pipe.transformer.double_blocks
    uncached = pipe()
    pipe.apply_infer_optimization(KINDS[strategy])
    with runs_of(blocks) as runs:
        first, second = pipe(), pipe()
    assert set(runs) == {2 * len(SCHEDULE)}
    pipe.cache_helper.disable()
    cached = dit_cache_fx.apply(
        pipe.transformer, strategy, blocks="double_blocks", no_cache_steps=SCHEDULE
    )
    assert torch.equal(first, Pipeline(cached, name)())
    assert torch.equal(first, second)
    assert not torch.equal(first, uncached)


def test_the_documented_integration_can_be_undone_and_done_again() -> None:
    pipe = Pipeline(case("OfficialHunyuanVideo15").build(), "OfficialHunyuanVideo15")
    uncached = pipe()
    pipe.apply_infer_optimization(TeaCacheHelper)
    pipe.apply_infer_optimization(DeepCacheHelper, no_cache_block_id={"double_blocks": [2]})
    with runs_of(pipe.transformer.double_blocks) as runs:
        assert not torch.equal(pipe(), uncached)
    assert runs == [len(SCHEDULE), len(SCHEDULE), STEPS]
    pipe.cache_helper.disable()
    assert torch.equal(pipe(), uncached)


@pytest.mark.parametrize("last", [False, True], ids=["all-cached", "last-never-cached"])
def test_every_block_list_as_a_plain_list(last: bool) -> None:
    name = "OfficialHunyuanVideo15Single"
    model = case(name).build()
    ids = {"double_blocks": {2}} if last else {}
    reference = DeepCacheReference(model, ["double_blocks", "single_blocks"], SCHEDULE, ids)
    helper = DeepCacheHelper(
        list(model.double_blocks), list(model.single_blocks), set(SCHEDULE), ids
    )
    helper.enable()
    with torch.no_grad():
        for step in range(STEPS):
            inputs = moving_inputs(case(name), step, STEPS)
            helper.cur_timestep = step
            assert torch.equal(flat(model(**inputs)), flat(reference(step, inputs))), step
    helper.disable()


def test_each_call_of_a_step_has_a_state_of_its_own() -> None:
    model = toy()
    want = [wanted(0, 3, prompt=p) for p in (0, 1)]
    helper = CacheHelper(model.blocks, no_cache_steps={0, 3})
    helper.enable()
    got: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        for step in range(6):
            helper.cur_timestep = step
            for prompt in (0, 1):
                inputs = moving_inputs(TOY, step, 6, prompt=prompt)
                got[prompt].append(flat(model(**inputs)))
    assert same(got[0], want[0])
    assert same(got[1], want[1])


@pytest.mark.parametrize("start", [0, 5])
def test_steps_count_from_the_first_of_the_generation(start: int) -> None:
    model = toy()
    helper = CacheHelper(model.blocks, no_cache_steps={0, 3})
    helper.enable()
    want = wanted(0, 3)
    for _ in range(2):
        with runs_of(model.blocks) as runs:
            assert same(generate(model, helper, start=start), want)
        assert runs == [2, 2, 2]


def test_a_generation_without_clear_states() -> None:
    model = toy()
    helper = CacheHelper(model.blocks, no_cache_steps={0, 3})
    helper.enable()
    generate(model, helper)
    helper.clear_states = lambda: None  # type: ignore[method-assign]
    assert same(generate(model, helper, prompt=1), wanted(0, 3, prompt=1))


def test_the_step_stays_until_another_is_set() -> None:
    """As with the published helpers: a loop may set it after each step, or never."""
    model = toy()
    helper = CacheHelper(model.blocks, no_cache_steps={0, 3})
    helper.enable()
    want = wanted(0, 3)
    helper.clear_states()
    with torch.no_grad():
        for step in range(6):
            assert helper.cur_timestep == step
            assert torch.equal(flat(model(**moving_inputs(TOY, step, 6))), want[step])
            helper.cur_timestep += 1
    helper.clear_states()
    assert same(generate(model), uncached())


def test_blocks_that_are_not_given_always_run() -> None:
    """`no_cache_block_id` counts in the given list."""
    model = toy(depth=5)
    some = [model.blocks[3], model.blocks[1], model.blocks[2]]
    helper = DeepCacheHelper(some, None, {0, 3}, {"double_blocks": {2}})
    helper.enable()
    with runs_of(model.blocks) as runs:
        got = generate(model, helper)
    assert runs == [6, 2, 6, 2, 6]
    ids = {"blocks": {0, 2, 4}}
    assert same(got, generate(deepcache(toy(depth=5), {0, 3}, no_cache_block_id=ids)))


def test_only_single_blocks() -> None:
    model = toy()
    helper = TeaCacheHelper(single_blocks=model.blocks, no_cache_steps={0, 3}, cache_name="h")
    helper.enable()
    assert same(generate(model, helper), wanted(0, 3, strategy="teacache"))


def test_the_cached_model_reports() -> None:
    model = toy()
    helper = CacheHelper(model.blocks, no_cache_steps={0})
    assert helper.cached is None
    helper.enable()
    generate(model, helper)
    assert helper.cached is not None
    report = helper.cached.cache_report()
    assert (report.calls_computed, report.calls_reused) == (1, 5)


# --- where the published helpers do otherwise -----------------------------------------------------


def test_stored_input_returns_the_last_result() -> None:
    model = toy()
    published = TeaCacheHelper(model.blocks, None, {0, 3}, "h", stored_input=True)
    published.enable()
    got = generate(model, published)
    published.disable()
    stale = wanted(0, 3)
    moving = wanted(0, 3, strategy="teacache")
    for step in range(6):
        torch.testing.assert_close(got[step], stale[step])
        assert (step in {0, 3}) == torch.allclose(got[step], moving[step], rtol=1e-4)


def test_skip_first_leaves_out_the_first_step() -> None:
    """With two computed steps there is no difference yet; with three there is one."""
    model = toy()
    helper = TaylorCacheHelper(model.blocks, None, {0, 1, 3}, 1, 1, 1, skip_first=True)
    helper.enable()
    got = generate(model, helper)
    helper.disable()
    stale = wanted(0, 1, 3)
    taylor = wanted(0, 1, 3, strategy="taylorcache", max_order=1)
    assert same(got[:4], stale[:4])
    assert not torch.allclose(taylor[2], stale[2], rtol=1e-4)
    assert same(got[4:], taylor[4:])


# --- life cycle -----------------------------------------------------------------------------------


def test_disable_leaves_nothing() -> None:
    model = toy()
    before = dict(vars(model))
    helper = CacheHelper(model.blocks, no_cache_steps={0})
    helper.disable()
    for _ in range(2):
        helper.enable()
        helper.enable()
        generate(model, helper)
        helper.disable()
        helper.disable()
        assert vars(model) == before
        assert same(generate(model, helper), uncached())


def test_a_forward_that_was_there_before() -> None:
    """Offloading, for instance, replaces it."""
    model = toy()
    calls: list[str] = []
    model.forward = hooked(model.forward, "before", calls)  # type: ignore[method-assign]
    mine = model.forward
    helper = CacheHelper(model.blocks, no_cache_steps={0})
    helper.enable()
    assert list(inspect.signature(model.forward).parameters) == ["x", "timestep", "text"]
    assert same(generate(model, helper), wanted(0))
    assert "before" in calls
    helper.disable()
    assert model.forward is mine


def test_a_forward_that_comes_later() -> None:
    model = toy()
    helper = CacheHelper(model.blocks, no_cache_steps={0})
    helper.enable()
    calls: list[str] = []
    later = hooked(model.forward, "later", calls)
    model.forward = later  # type: ignore[method-assign]
    with runs_of(model.blocks) as runs:
        assert same(generate(model, helper), wanted(0))
    assert runs == [1, 1, 1]
    helper.disable()
    assert model.forward is later
    with runs_of(model.blocks) as runs:
        assert same(generate(model, helper), uncached())
    assert runs == [6, 6, 6]


def hooked(forward: Callable[..., Any], name: str, calls: list[str]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return forward(*args, **kwargs)

    return run


def test_an_error_in_a_step_leaves_nothing_behind() -> None:
    model = toy()
    helper = CacheHelper(model.blocks, no_cache_steps={0, 3})
    helper.enable()
    with torch.no_grad(), pytest.raises(TypeError):
        model(nonsense=1)
    with torch.no_grad(), pytest.raises(RuntimeError):
        model(torch.zeros(1, 6, 3), torch.zeros(1), torch.zeros(1, 4, 3))
    assert same(generate(model, helper), wanted(0, 3))


def test_options_that_change_take_effect_at_the_next_generation() -> None:
    model = toy()
    helper = DeepCacheHelper(model.blocks, None, {0, 3})
    helper.enable()
    generate(model, helper)
    helper.no_cache_steps = range(0, 6, 2)
    with runs_of(model.blocks) as runs:
        generate(model, helper)
    assert runs == [3, 3, 3]
    helper.no_cache_block_id = {"double_blocks": [1]}
    with runs_of(model.blocks) as runs:
        generate(model, helper)
    assert runs == [3, 6, 3]
    helper.reset_states()
    assert helper.cur_timestep == 0
    with runs_of(model.blocks) as runs:
        generate(model, helper)
    assert runs == [3, 6, 3]


def test_iterators_are_read_once() -> None:
    model = toy()
    helper = CacheHelper(model.blocks.children(), no_cache_steps=iter([0, 3]))
    for _ in range(2):
        helper.enable()
        with runs_of(model.blocks) as runs:
            generate(model, helper)
        assert runs == [2, 2, 2]


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    loaded: nn.Module = pickle.loads(pickle.dumps(model))
    return loaded


def saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    loaded: nn.Module = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    return loaded


@pytest.mark.parametrize("duplicate", [copied, pickled, saved])
def test_a_copy_of_the_model_is_the_uncached_model(
    duplicate: Callable[[nn.Module], nn.Module],
) -> None:
    model = toy()
    helper = CacheHelper(model.blocks, no_cache_steps={0})
    helper.enable()
    generate(model, helper)
    other = duplicate(model)
    with torch.no_grad():
        other.embed.weight.mul_(2)
    with runs_of(model.blocks) as runs, runs_of(other.blocks) as other_runs:
        got = generate(other)
    assert (runs, other_runs) == ([0, 0, 0], [6, 6, 6])
    changed = toy()
    with torch.no_grad():
        changed.embed.weight.mul_(2)
    assert same(got, generate(changed))
    again = CacheHelper(other.blocks, no_cache_steps={0})
    again.enable()
    assert same(generate(other, again), generate(deepcache(changed, {0})))
    assert same(generate(model, helper), wanted(0))


def test_a_copy_of_the_helper_belongs_to_the_copy_of_the_model() -> None:
    pipe = {"model": toy()}
    helper = CacheHelper(pipe["model"].blocks, no_cache_steps={0})
    helper.enable()
    other, other_helper = copy.deepcopy((pipe["model"], helper))
    assert other_helper.cached is None
    other_helper.enable()
    with runs_of(pipe["model"].blocks) as runs, runs_of(other.blocks) as other_runs:
        assert same(generate(other, other_helper), wanted(0))
    assert (runs, other_runs) == ([0, 0, 0], [1, 1, 1])


def test_one_helper_at_a_time() -> None:
    model = toy()
    first = CacheHelper(model.blocks, no_cache_steps={0})
    second = CacheHelper(model.blocks, no_cache_steps={0, 1})
    first.enable()
    with pytest.raises(OptionError, match="another helper is enabled on it: disable"):
        second.enable()
    with runs_of(model.blocks) as runs:
        generate(model, first)
    assert runs == [1, 1, 1]
    first.disable()
    second.enable()
    with runs_of(model.blocks) as runs:
        generate(model, second)
    assert runs == [2, 2, 2]


def test_a_helper_that_is_gone_gives_way() -> None:
    """A pipeline that makes a new helper in the place of its old one."""
    model = toy()
    before = dict(vars(model))
    helper = CacheHelper(model.blocks, no_cache_steps={0})
    helper.enable()
    helper = CacheHelper(model.blocks, no_cache_steps={0, 1})
    helper.enable()
    with runs_of(model.blocks) as runs:
        generate(model, helper)
    assert runs == [2, 2, 2]
    helper.disable()
    assert vars(model) == before


def test_two_models_are_apart() -> None:
    models = [toy(), toy()]
    helpers = [CacheHelper(m.blocks, no_cache_steps=s) for m, s in zip(models, ({0}, {0, 1, 4}))]  # noqa: B905
    for helper in helpers:
        helper.enable()
    want = [wanted(0), wanted(0, 1, 4)]
    got: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        for step in range(6):
            for model, helper, outputs in zip(models, helpers, got, strict=True):
                helper.cur_timestep = step
                outputs.append(flat(model(**moving_inputs(TOY, step, 6))))
    assert same(got[0], want[0])
    assert same(got[1], want[1])


# --- which model ----------------------------------------------------------------------------------


def test_lists_inside_another_module_need_the_model() -> None:
    model = make(NestedBlocksDiT)
    blocks = model.trunk_module.layers
    helper = CacheHelper(blocks, no_cache_steps={0, 3}, model=model)
    helper.enable()
    want = generate(deepcache(make(NestedBlocksDiT), {0, 3}))
    with runs_of(blocks) as runs:
        assert same(generate(model, helper), want)
    assert runs == [2, 2, 2]


def test_a_list_that_two_modules_hold_needs_the_model() -> None:
    model, other = toy(), nn.Module()
    other.blocks = model.blocks
    helper = CacheHelper(model.blocks, no_cache_steps={0})
    with pytest.raises(OptionError, match=r"model=None: 2 modules hold these lists.*model=\.\.\."):
        helper.enable()
    helper.model = model
    helper.enable()
    assert same(generate(model, helper), wanted(0))


def test_a_cached_view_of_the_model_is_none_of_them() -> None:
    model = toy()
    cached = deepcache(model, {0})
    helper = CacheHelper(model.blocks, no_cache_steps={0})
    helper.enable()
    generate(model, helper)
    with torch.no_grad(), pytest.raises(CaptureError, match="a helper is enabled on the model"):
        cached(**moving_inputs(TOY, 0, 6))
    with pytest.raises(OptionError, match="a helper is enabled on it"):
        deepcache(model, {0})
    helper.disable()
    assert same(generate(cached), wanted(0))


# --- torch.compile --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("enabled", "fullgraph"),
    [("before", True), ("after", True), ("late", False)],
)
def test_compiled(enabled: str, fullgraph: bool) -> None:
    """`late`: the compiled model has run without the helper."""
    torch._dynamo.reset()
    model = toy()
    helper = TaylorCacheHelper(model.blocks, None, {0, 3})
    if enabled == "before":
        helper.enable()
    compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
    if enabled == "late":
        assert same(generate(compiled), uncached())
    if enabled != "before":
        helper.model = compiled
        helper.enable()
    want = wanted(0, 3, strategy="taylorcache")
    for _ in range(2):
        got = generate(compiled, helper)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert helper.cached is not None
    report = helper.cached.cache_report()
    assert (report.calls_computed, report.calls_reused) == (4, 8)
    helper.disable()
    assert same(generate(compiled), uncached())


def test_inside_another_compiled_function() -> None:
    """The graph is there from a call before; the step is told from the timestep then."""
    torch._dynamo.reset()
    model = toy()
    helper = CacheHelper(model.blocks, no_cache_steps={0, 3})
    helper.enable()
    generate(model, helper, steps=1)
    sampled = torch.compile(lambda **inputs: 1 * model(**inputs), backend="eager", fullgraph=True)
    for _ in range(2):
        for got, want in zip(generate(sampled, helper), wanted(0, 3), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    with runs_of(model.blocks) as runs:
        generate(model, helper)
    assert runs == [2, 2, 2]
    helper.disable()
    assert same(generate(sampled), uncached())


# --- bad input ------------------------------------------------------------------------------------


def bad(expected: str, **arguments: Any) -> Any:
    return pytest.param(arguments, expected, id=expected[:40])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        bad("double_blocks=[]: at least one of double_blocks and single_blocks", double_blocks=[]),
        bad("at least one of double_blocks", double_blocks=None, single_blocks=None),
        bad("double_blocks='blocks': a list of the model's block modules", double_blocks="blocks"),
        bad("double_blocks=7: a list of the model's", double_blocks=7),
        bad("double_blocks='Linear': a list of the model's", double_blocks=nn.Linear(1, 1)),
        bad("single_blocks[0]='blocks.0': a list of the model's", single_blocks=["blocks.0"]),
        bad("model=None: no module holds them; pass the model", double_blocks=[nn.Linear(1, 1)]),
        bad("no_cache_steps=None: the indices of the steps to compute", no_cache_steps=None),
        bad("no_cache_steps=[-1, 0]: a collection of step indices", no_cache_steps={0, -1}),
        bad("no_cache_block_id={'double_blocks': [3]}: double_blocks has 3 blocks, ids 0 to 2; "
            "got [3]", no_cache_block_id={"double_blocks": {3}}),
        bad("no list is called 'single_blocks'; given are ['double_blocks']",
            no_cache_block_id={"single_blocks": {0}}),
        bad("no_cache_block_id={'double_blocks': 3}: a mapping",
            no_cache_block_id={"double_blocks": 3}),
        bad("model='ToyDiT': an nn.Module", model="ToyDiT"),
        bad("double_blocks[0]='Block': no module list of the model (ToyDiT) holds this block; "
            "it has ['blocks']", model=toy()),
        bad("model='CachedModel': the model itself: this one is cached already",
            model=deepcache(toy(), {0})),
        bad("timestep='tau'", timestep="tau"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(arguments: dict[str, Any], expected: str) -> None:
    model = toy()
    before = dict(vars(model))
    given: dict[str, Any] = {"double_blocks": model.blocks, "no_cache_steps": {0}, **arguments}
    helper = DeepCacheHelper(**given)
    with pytest.raises(DitCacheError) as error:
        helper.enable()
    assert expected in str(error.value)
    assert vars(model) == before


def test_options_of_one_kind() -> None:
    model = toy()
    with pytest.raises(OptionError, match="max_order=-1: an integer from 0"):
        TaylorCacheHelper(model.blocks, None, {0}, -1).enable()
    with pytest.raises(OptionError, match="cache_name=3: the name of a block argument"):
        TeaCacheHelper(model.blocks, None, {0}, 3).enable()  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="nonsense"):
        TeaCacheHelper(model.blocks, None, {0}, nonsense=1)


@pytest.mark.parametrize("step", [-1, 1.5, "3", None, True])
def test_a_step_is_an_index(step: Any) -> None:
    helper = CacheHelper()
    with pytest.raises(OptionError, match=r"cur_timestep=.*a step index: an integer from 0"):
        helper.cur_timestep = step
    helper.cur_timestep = torch.tensor(3)  # type: ignore[assignment]
    assert helper.cur_timestep == 3


def test_a_model_in_training_mode_is_refused() -> None:
    model = toy().train()
    with pytest.raises(OptionError, match=r"model\.training=True: call model\.eval\(\)"):
        CacheHelper(model.blocks, no_cache_steps={0}).enable()
