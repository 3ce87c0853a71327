"""A cached model is the model: its attributes, weights, hooks, adapters, copies.

What is changed after `apply`, on either of the two, takes effect at the next computed step.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

import dit_cache_fx
from dit_cache_fx import CachedModel, DitCacheWarning, OptionError
from tests.toys import (
    DEPTH,
    DIM,
    TOY,
    Block,
    ByHand,
    StatefulDiT,
    TimeEmbedding,
    ToyDiT,
    actions,
    follows,
    generation,
    make,
    new,
    runs_of,
    toy_inputs,
)
from tests.zoo import Case, case, flat
from tests.zoo.case import redraw

STEPS = {0, 2, 3}
FLUX = case("FluxTransformer2DModel")
WAN = case("WanTransformer3DModel")


pytestmark = pytest.mark.usefixtures("no_grad")


def cache_of(model: nn.Module, steps: set[int] = STEPS) -> CachedModel:
    return dit_cache_fx.apply(model, "deepcache", no_cache_steps=steps)


def assert_is_cached(
    cached: CachedModel, model: nn.Module, model_case: Case = TOY, **options: Any
) -> None:
    """One generation: its computed steps are `model`'s as it is now, the others are reused."""
    for computes, inputs in generation(model_case, STEPS, **options):
        same = torch.equal(flat(cached(**inputs)), flat(model(**inputs)))
        assert same == computes
    assert actions(cached) == "CrCCrr"


# --- attributes ---------------------------------------------------------------------------------


def test_attributes_are_the_models() -> None:
    model = FLUX.build()
    cached = cache_of(model)
    assert cached.config is model.config
    assert cached.config.num_layers == 3
    assert cached.dtype == torch.float32
    assert cached.device == torch.device("cpu")
    assert cached.transformer_blocks is model.transformer_blocks
    assert cached.attn_processors.keys() == model.attn_processors.keys()
    assert cached.num_parameters() == model.num_parameters()
    assert isinstance(cached, nn.Module)
    assert not hasattr(cached, "no_such_attribute")
    assert set(dir(model)) <= set(dir(cached))


def test_attributes_are_written_to_and_deleted_from_the_model() -> None:
    model = make(ToyDiT)
    cached = cache_of(model)
    cached.note = "new"
    assert model.note == "new"
    del cached.note
    assert not hasattr(model, "note")
    with pytest.raises(AttributeError, match="note"):
        _ = cached.note


@pytest.mark.parametrize("calls", [0, 2])
def test_parameters_state_and_modules_are_the_models(calls: int) -> None:
    model = FLUX.build()
    names = [name for name, _ in model.named_modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    cached = cache_of(model)
    for _, inputs in generation(FLUX, STEPS)[:calls]:
        cached(**inputs)
    assert [name for name, _ in cached.named_modules()] == names
    assert list(cached.state_dict()) == list(state)
    assert all(a is b for a, b in zip(cached.parameters(), model.parameters(), strict=True))
    assert all(torch.equal(value, state[name]) for name, value in cached.state_dict().items())
    assert [n for n, _ in cached.named_buffers()] == [n for n, _ in model.named_buffers()]


def test_the_original_is_untouched_by_apply_and_calls() -> None:
    model = FLUX.build()
    inputs = FLUX.inputs(1.0)
    output = flat(model(**inputs))
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    own = {name: value for name, value in vars(model).items() if not name.startswith("_")}
    cached = cache_of(model)
    for _, each in generation(FLUX, STEPS):
        cached(**each)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert all(vars(model)[name] is value for name, value in own.items())
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(flat(model(**inputs)), output)


def test_output_is_of_the_models_class() -> None:
    cached = cache_of(FLUX.build())
    for _, inputs in generation(FLUX, STEPS, steps=2):
        assert isinstance(cached(**(inputs | {"return_dict": True})), Transformer2DModelOutput)
        assert isinstance(cached(**inputs), tuple)


def test_it_may_be_a_part_of_another_module() -> None:
    class Pipeline(nn.Module):
        def __init__(self, transformer: nn.Module) -> None:
            super().__init__()
            self.transformer = transformer

        def forward(self, **inputs: Any) -> Tensor:
            return self.transformer(**inputs)

    model = make(ToyDiT)
    plain, pipeline = Pipeline(model), Pipeline(cache_of(model))
    assert list(pipeline.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in pipeline.named_modules()] == [n for n, _ in plain.named_modules()]
    pipeline.eval()
    assert not model.training
    for dtype in (torch.float32, torch.float64):
        pipeline.to(dtype)
        for computes, inputs in generation(TOY, STEPS, dtype=dtype):
            assert torch.equal(pipeline(**inputs), plain(**inputs)) == computes


def test_diffusers_methods_of_the_model() -> None:
    model = FLUX.build()
    cached = cache_of(model)
    assert_is_cached(cached, model, FLUX)
    cached.fuse_qkv_projections()
    assert_is_cached(cached, model, FLUX)
    cached.unfuse_qkv_projections()
    cached.set_attention_backend("native")
    assert_is_cached(cached, model, FLUX)


def test_saved_and_loaded_by_diffusers(tmp_path: Any) -> None:
    cached = cache_of(FLUX.build())
    inputs = FLUX.inputs(1.0)
    expected = flat(cached(**inputs))
    cached.save_pretrained(tmp_path)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(flat(loaded(**inputs)), expected)


# --- changes after apply ----------------------------------------------------------------------


def replace_data(model: Any) -> None:
    model.head.weight.data = model.head.weight.data * 2


def replace_parameter(model: Any) -> None:
    model.head.weight = nn.Parameter(model.head.weight * 2)


def load_other_state(model: Any) -> None:
    model.load_state_dict({name: value + 0.1 for name, value in model.state_dict().items()})


def assign_other_state(model: Any) -> None:
    state = {name: value + 0.1 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def hook_on(name: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _module, _args, output: output * 1.5)

    return change


def pre_hook_on(name: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _module, args: (args[0] * 1.5, *args[1:]))

    return change


def replace_forward(name: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        module = model.get_submodule(name)
        forward = module.forward
        module.forward = lambda *args: 1.5 * forward(*args)

    return change


CHANGES: dict[str, Callable[[Any], Any]] = {
    "weight of a layer": lambda m: m.head.weight.mul_(2),
    "weight of a layer before the blocks": lambda m: m.embed.weight.mul_(2),
    "weight in a composite module": lambda m: m.time.linear.weight.mul_(2),
    "weight of a block": lambda m: m.blocks[1].mix.weight.mul_(2),
    "all weights": lambda m: redraw(m, 7),
    "data of a weight": replace_data,
    "parameter": replace_parameter,
    "load_state_dict": load_other_state,
    "load_state_dict with assign": assign_other_state,
    "parameter of the root": lambda m: m.position.add_(1),
    "parameter of the root replaced": lambda m: setattr(
        m, "position", nn.Parameter(torch.ones_like(m.position))
    ),
    "buffer of the root": lambda m: m.phases.add_(1),
    "buffer of the root replaced": lambda m: setattr(m, "phases", m.phases + 1),
    "layer": lambda m: setattr(m, "head", new(nn.Linear, DIM, DIM)),
    "layer by a composite": lambda m: setattr(
        m, "head", nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh())
    ),
    "layer by identity": lambda m: setattr(m, "embed", nn.Identity()),
    "composite module": lambda m: setattr(m, "time", new(TimeEmbedding)),
    "layer in a composite": lambda m: setattr(m.time, "linear", new(nn.Linear, 2, DIM)),
    "block": lambda m: m.blocks.__setitem__(1, new(Block)),
    "layer in a block": lambda m: setattr(m.blocks[1], "mix", new(nn.Linear, DIM, DIM)),
    "list of blocks": lambda m: setattr(
        m, "blocks", nn.ModuleList([new(Block, seed=i) for i in range(DEPTH)])
    ),
    "block appended": lambda m: m.blocks.append(new(Block)),
    "block removed": lambda m: m.blocks.__delitem__(0),
    "attribute of the root": lambda m: setattr(m, "gain", 2.0),
    "attribute of a composite": lambda m: setattr(m.time, "scale", 0.03),
    "attribute in a list": lambda m: m.factors.__setitem__(0, 3.0),
    "attribute in a dict": lambda m: m.options.update(bias=1.0),
    "hook on a layer": hook_on("head"),
    "hook on a block": hook_on("blocks.1"),
    "hook on a composite": hook_on("time"),
    "pre-hook on a layer": pre_hook_on("embed"),
    "pre-hook on a block": pre_hook_on("blocks.0"),
    "pre-hook on a composite": pre_hook_on("time"),
    "forward of a layer": replace_forward("head"),
    "forward of a block": replace_forward("blocks.2"),
    "forward of a composite": replace_forward("time"),
}
each_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


@each_change
def test_change_between_apply_and_the_first_call(change: Callable[[Any], Any]) -> None:
    model = make(StatefulDiT)
    cached = cache_of(model)
    change(model)
    assert_is_cached(cached, model)


@each_change
def test_change_between_two_generations(change: Callable[[Any], Any]) -> None:
    model = make(StatefulDiT)
    cached = cache_of(model)
    assert_is_cached(cached, model)
    before = model(**toy_inputs(1.0))
    change(model)
    assert not torch.equal(model(**toy_inputs(1.0)), before)
    assert_is_cached(cached, model, prompt=1)
    assert len(cached.cache_report().captures) == 1


class Negate(nn.Module):
    """Changes its input in place."""

    def forward(self, x: Tensor) -> Tensor:
        return x.neg_()


CHANGES_ITS_INPUT: dict[str, Callable[[Any], Any]] = {
    "layer": lambda m: setattr(m, "head", Negate()),
    "forward": lambda m: setattr(m.head, "forward", lambda x: x.neg_()),
}


@pytest.mark.parametrize("change", CHANGES_ITS_INPUT.values(), ids=CHANGES_ITS_INPUT)
def test_a_layer_behind_the_blocks_that_changes_its_input_in_place(
    change: Callable[[Any], Any],
) -> None:
    """Put there after the capture: what is cached is still what the blocks gave."""
    model = make(ToyDiT)
    cached = cache_of(model)
    assert_is_cached(cached, model)
    change(model)
    want = torch.empty(0)
    for computes, inputs in generation(TOY, STEPS, prompt=1):
        want = model(**inputs) if computes else want  # the head reads the blocks' output only
        assert torch.equal(cached(**inputs), want)


@pytest.mark.parametrize(
    "name",
    [
        "load_state_dict",
        "load_state_dict with assign",
        "parameter of the root replaced",
        "buffer of the root replaced",
        "layer",
        "block",
        "attribute of the root",
    ],
)
def test_change_through_the_cached_model(name: str) -> None:
    model = make(StatefulDiT)
    cached = cache_of(model)
    assert_is_cached(cached, model)
    before = model(**toy_inputs(1.0))
    CHANGES[name](cached)
    assert not torch.equal(model(**toy_inputs(1.0)), before)
    assert_is_cached(cached, model, prompt=1)


@each_change
def test_change_within_a_generation_takes_effect_at_the_next_computed_step(
    change: Callable[[Any], Any],
) -> None:
    model = make(StatefulDiT)
    cached = cache_of(model)
    calls = generation(TOY, STEPS)
    for _, inputs in calls[:2]:
        cached(**inputs)
    change(model)
    for computes, inputs in calls[2:]:
        same = torch.equal(cached(**inputs), model(**inputs))
        assert same == computes
    timeline = cached.cache_report().timeline
    assert [record.step for record in timeline] == [0, 1, 2, 3, 4, 5]


def test_a_changed_block_list_is_cached_whole() -> None:
    model = make(ToyDiT)
    cached = cache_of(model)
    assert_is_cached(cached, model)
    model.blocks.append(new(Block))
    model.blocks[1] = new(Block, seed=6)
    with runs_of(model.blocks) as counts:
        for _, inputs in generation(TOY, STEPS):
            cached(**inputs)
    assert counts == [3] * (DEPTH + 1)
    report = cached.cache_report()
    assert report.blocks == {"blocks": DEPTH + 1}
    assert report.cached_blocks == {"blocks": (0, 1, 2, 3)}


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.to(torch.float64),
        lambda m: m.double(),
        lambda m: m.to(dtype=torch.float64, device="cpu"),
    ],
)
@pytest.mark.parametrize("through", ["model", "cached"])
def test_dtype_changed_after_calls(through: str, convert: Callable[[Any], Any]) -> None:
    model = make(StatefulDiT)
    cached = cache_of(model)
    assert_is_cached(cached, model)
    converted = convert(model if through == "model" else cached)
    assert converted is (model if through == "model" else cached)
    assert next(cached.parameters()).dtype == torch.float64
    assert_is_cached(cached, model, dtype=torch.float64)
    assert cached(**toy_inputs(1.0, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_diffusers_model_in_half_precision_after_calls(dtype: torch.dtype) -> None:
    model = FLUX.build()
    cached = cache_of(model)
    assert_is_cached(cached, model, FLUX)
    cached.to(dtype)
    assert cached.dtype == dtype
    assert_is_cached(cached, model, FLUX, dtype=dtype)


# --- training mode ---------------------------------------------------------------------------


def test_train_and_eval_after_apply() -> None:
    model = make(ToyDiT)
    cached = cache_of(model)
    assert_is_cached(cached, model)
    assert cached.train() is cached
    assert model.training
    assert model.blocks[0].training
    assert cached.training
    with pytest.warns(DitCacheWarning, match=r"not cached: the model is in training mode"):
        got = cached(**toy_inputs(1.0))
    assert torch.equal(got, model(**toy_inputs(1.0)))
    assert cached.eval() is cached
    assert not model.training
    assert_is_cached(cached, model, prompt=1)


def test_the_models_own_mode_counts() -> None:
    model = make(ToyDiT)
    cached = cache_of(model)
    model.train()
    assert cached.training
    with pytest.warns(DitCacheWarning, match="training mode"):
        cached(**toy_inputs(1.0))
    assert cached.cache_report().calls_computed == 0


# --- hooks on the root -------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after", "between"])
@pytest.mark.parametrize("through", ["model", "cached"])
def test_hooks_on_the_root_run_on_every_step(when: str, through: str) -> None:
    model = make(ToyDiT)
    if when == "before" and through == "cached":
        pytest.skip("there is no cached model yet")
    cached: Any = None
    calls = generation(TOY, STEPS)
    seen: list[Any] = []

    def register() -> None:
        target = model if through == "model" else cached
        target.register_forward_pre_hook(lambda _m, _args: seen.append("before"))
        target.register_forward_hook(lambda _m, _args, output: output * 2)

    if when == "before":
        register()
    cached = cache_of(model)
    by_hand = ByHand(make(ToyDiT), ["blocks"])
    if when == "after":
        register()
    for index, (computes, inputs) in enumerate(calls):
        if when == "between" and index == 3:
            register()
        hooked = when != "between" or index >= 3
        want = by_hand(computes, **inputs) * (2 if hooked else 1)
        assert torch.equal(cached(**inputs), want)
    assert seen == ["before"] * (3 if when == "between" else 6)


def test_hooks_on_the_root_may_change_arguments_given_by_keyword() -> None:
    model = make(ToyDiT)
    cached = cache_of(model)

    def doubled(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {"x": 2 * kwargs["x"]}

    cached.register_forward_pre_hook(doubled, with_kwargs=True)
    by_hand = ByHand(make(ToyDiT), ["blocks"])
    for computes, inputs in generation(TOY, STEPS):
        want = by_hand(computes, **(inputs | {"x": 2 * inputs["x"]}))
        assert torch.equal(cached(**inputs), want)


@pytest.mark.parametrize("name", ["head", "embed", "time", "blocks.1"])
def test_hooks_that_were_there_before_apply(name: str) -> None:
    model = make(ToyDiT)
    hook_on(name)(model)
    pre_hook_on(name)(model)
    cached = cache_of(model)
    assert_is_cached(cached, model)


def test_hooks_of_reused_blocks_do_not_run() -> None:
    model = make(ToyDiT)
    cached = cache_of(model)
    ran: list[int] = []
    model.blocks[0].register_forward_hook(lambda *_: ran.append(0))
    for _, inputs in generation(TOY, STEPS):
        cached(**inputs)
    assert len(ran) == len(STEPS)


def test_a_removed_hook_runs_no_more() -> None:
    model = make(ToyDiT)
    handle = model.time.register_forward_hook(lambda _m, _args, output: output * 2)
    cached = cache_of(model)
    assert_is_cached(cached, model)
    handle.remove()
    assert torch.equal(model(**toy_inputs(1.0)), make(ToyDiT)(**toy_inputs(1.0)))
    assert_is_cached(cached, model, prompt=1)


# --- compiled blocks ------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "between"])
@pytest.mark.parametrize("how", ["block.compile", "torch.compile"])
def test_compiled_blocks(how: str, when: str) -> None:
    model = make(ToyDiT)
    cached: CachedModel | None = None

    def compile_blocks() -> None:
        for index, block in enumerate(model.blocks):
            if how == "block.compile":
                block.compile(backend="eager")
            else:
                model.blocks[index] = torch.compile(block, backend="eager")

    if when == "before":
        compile_blocks()
    cached = cache_of(model)
    if when == "between":
        assert_is_cached(cached, model)
        compile_blocks()
    with runs_of(model.blocks) as counts:
        for computes, inputs in generation(TOY, STEPS, prompt=1):
            same = torch.equal(cached(**inputs), make(ToyDiT)(**inputs))
            assert same == computes
    assert counts == [3] * DEPTH
    assert actions(cached) == "CrCCrr"


# --- adapters ---------------------------------------------------------------------------------


def lora(*targets: str) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), init_lora_weights=False)


TARGETS = {
    "in blocks": ("to_q", "to_v"),
    "around blocks": ("proj_out", "x_embedder", "context_embedder"),
    "everywhere": ("to_q", "proj_out", "linear_1"),
}


@pytest.mark.parametrize(
    ("when", "targets"),
    [
        pytest.param(
            when,
            targets,
            id=f"{when}-{name}",
            marks=() if name == "everywhere" else pytest.mark.exhaustive,
        )
        for when in ("before", "after", "between")
        for name, targets in TARGETS.items()
    ],
)
def test_lora_adapters(when: str, targets: tuple[str, ...]) -> None:
    config = lora(*targets)
    model = FLUX.build()
    plain = flat(model(**FLUX.inputs(1.0)))
    if when == "before":
        model.add_adapter(config)
    cached = cache_of(model)
    if when == "between":
        assert_is_cached(cached, model, FLUX)
    if when != "before":
        cached.add_adapter(config)
    assert not torch.equal(flat(model(**FLUX.inputs(1.0))), plain)
    assert_is_cached(cached, model, FLUX, prompt=1)
    assert cached.cache_report().cached_blocks == {
        "transformer_blocks": (0, 1, 2),
        "single_transformer_blocks": (0, 1, 2),
    }


def test_lora_scale_switch_fusion_and_removal_take_effect() -> None:
    config = lora(*TARGETS["everywhere"])
    model = FLUX.build()
    cached = cache_of(model)
    cached.add_adapter(config)
    results = []
    changes: tuple[Callable[[], Any], ...] = (
        lambda: None,
        lambda: cached.set_adapters("default", 0.3),
        cached.disable_adapters,
        cached.enable_adapters,
        cached.fuse_lora,
        cached.unfuse_lora,
        cached.unload_lora,
    )
    for change in changes:
        change()
        assert_is_cached(cached, model, FLUX)
        results.append(flat(model(**FLUX.inputs(1.0))))
    assert not torch.equal(results[0], results[1])
    assert torch.equal(results[2], flat(FLUX.build()(**FLUX.inputs(1.0))))


# --- copies -----------------------------------------------------------------------------------


def through_torch_save(cached: CachedModel) -> CachedModel:
    file = io.BytesIO()
    torch.save(cached, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[CachedModel], CachedModel]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda cached: pickle.loads(pickle.dumps(cached)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("calls", [0, 2])
def test_a_copy_is_a_working_cached_model(
    how: Callable[[CachedModel], CachedModel], calls: int
) -> None:
    model = make(ToyDiT)
    options: dict[str, Any] = {"no_cache_steps": STEPS, "no_cache_block_id": {"blocks": {2}}}
    cached = dit_cache_fx.apply(model, "deepcache", **options)
    first = generation(TOY, STEPS)
    for _, inputs in first[:calls]:
        cached(**inputs)
    other = how(cached)
    assert isinstance(other, CachedModel)
    assert other.cache_report().calls_computed == 0
    by_hand = ByHand(model, ["blocks"], never=["blocks.2"])
    follows(other, by_hand, generation(TOY, STEPS, prompt=1))
    assert actions(other) == "CrCCrr"
    assert other.cache_report().cached_blocks == {"blocks": (0, 1)}
    if calls:  # the copy has not disturbed it
        assert actions(cached) == "Cr"
        for computes, inputs in first[calls:]:
            assert torch.equal(cached(**inputs), model(**inputs)) == computes


@pytest.mark.parametrize("name", [n for n in COPIES if n != "copy"])
def test_a_deep_copy_runs_its_own_blocks_with_its_own_weights(name: str) -> None:
    model = make(ToyDiT)
    cached = cache_of(model)
    cached(**toy_inputs(1000.0))
    other = COPIES[name](cached)
    with runs_of(model.blocks) as counts, runs_of(other.blocks) as own:
        other(**toy_inputs(1000.0))
    assert (counts, own) == ([0] * DEPTH, [1] * DEPTH)
    redraw(other, 9)
    assert torch.equal(cached(**toy_inputs(1000.0)), model(**toy_inputs(1000.0)))
    assert not torch.equal(other(**toy_inputs(1000.0)), model(**toy_inputs(1000.0)))


def test_a_shallow_copy_shares_the_weights_and_holds_a_state_of_its_own() -> None:
    model = make(ToyDiT)
    cached = cache_of(model)
    other = copy.copy(cached)
    assert other.blocks is model.blocks
    calls = generation(TOY, STEPS)
    follows(cached, ByHand(model, ["blocks"]), calls[:2])
    follows(other, ByHand(model, ["blocks"]), generation(TOY, STEPS, prompt=1))
    cached.reset_states()
    assert other.cache_report().calls_computed == 3


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
def test_a_copy_keeps_what_was_set(how: Callable[[CachedModel], CachedModel]) -> None:
    model = make(ToyDiT)
    cached = dit_cache_fx.apply(model, "deepcache", schedule="fast", num_steps=20)
    cached.num_steps = 30
    cached.disable()
    cached.compile_steps(backend="eager", fullgraph=True)
    other = how(cached)
    assert not other.cache_report().enabled
    assert other.num_steps == 30
    compiler = other._engine.step_compiler
    assert compiler is not None
    assert compiler.options == {"backend": "eager", "fullgraph": True}
    assert torch.equal(other(**toy_inputs(900.0)), model(**toy_inputs(900.0)))
    cached.enable()
    cached.num_steps = None
    again = how(cached)
    assert again.cache_report().enabled
    assert again.num_steps is None


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
def test_a_copy_in_training_mode(how: Callable[[CachedModel], CachedModel]) -> None:
    model = make(ToyDiT)
    cached = cache_of(model)
    cached.train()
    other = how(cached)
    assert other.training
    with pytest.warns(DitCacheWarning, match="training mode"):
        other(**toy_inputs(900.0))
    other.eval()
    follows(other, ByHand(model, ["blocks"]), generation(TOY, STEPS))


def test_a_model_that_was_compiled_before_is_refused() -> None:
    model = make(ToyDiT)
    model.compile(backend="eager")
    with pytest.raises(OptionError, match=r"apply to a model that is not compiled.*cached.compile"):
        cache_of(model)


def test_a_cached_model_can_be_compiled_in_place() -> None:
    model = make(ToyDiT)
    cached = cache_of(model)
    graphs: list[Any] = []

    def backend(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    cached.compile(backend=backend, fullgraph=True)
    follows(cached, ByHand(model, ["blocks"]), generation(TOY, STEPS))
    assert len(graphs) == 1
    assert actions(cached) == "CrCCrr"
    with pytest.raises(OptionError, match="is not compiled"):
        cache_of(cached)
    torch._dynamo.reset()


def test_a_copy_of_a_diffusers_model_with_explicit_blocks() -> None:
    model = WAN.build()
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS, blocks=model.blocks)
    assert_is_cached(copy.deepcopy(cached), model, WAN)


def test_printed_it_names_strategy_and_model() -> None:
    assert repr(cache_of(make(ToyDiT))).startswith("CachedModel(deepcache, ToyDiT(")
