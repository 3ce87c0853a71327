"""How a compiled model is called: branches of CFG, resolutions, steps, modes, users' own code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_cache_fx
from dit_cache_fx import CachedModel
from dit_cache_fx.values.pytree import flatten
from tests.compile.compiling import (
    RULE,
    STEPS,
    STRATEGIES,
    Counting,
    assert_same,
    breaks,
    calls_of,
    compiled,
    no_recompile,
)
from tests.toys import (
    TOY,
    AnyTimeDiT,
    ByHand,
    OutputsDiT,
    ToyDiT,
    actions,
    follows,
    generation,
    make,
    toy_inputs,
)
from tests.zoo.case import rows

Compiled = Any


def cache_of(model: nn.Module) -> CachedModel:
    return dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)


def text_of(name: str, tokens: int = 4) -> Tensor:
    return rows(name, 0, (tokens, 8), 1, torch.float32)


@pytest.fixture
def model() -> nn.Module:
    return make(ToyDiT)


@pytest.mark.parametrize("dynamic", [False, None])
@pytest.mark.parametrize("eager_first", [False, True])
def test_with_and_without_an_eager_call_before(
    model: nn.Module, dynamic: bool | None, eager_first: bool
) -> None:
    cached, backend = cache_of(model), Counting()
    compiled_model = compiled(cached, backend, dynamic=dynamic)
    if eager_first:
        follows(cached, ByHand(model, ["blocks"]), generation(TOY, STEPS, prompt=2))
    with no_recompile():
        for prompt in (0, 1):
            calls = generation(TOY, STEPS, prompt=prompt)
            follows(compiled_model, ByHand(model, ["blocks"]), calls)
    assert (backend.count, breaks()) == (1, 0)


def test_eager_and_compiled_calls_may_take_turns(model: nn.Module) -> None:
    """Both are calls of the same generation."""
    cached, by_hand = cache_of(model), ByHand(model, ["blocks"])
    compiled_model = compiled(cached, "eager")
    with no_recompile():
        for index, call in enumerate(generation(TOY, STEPS)):
            follows(cached if index % 2 else compiled_model, by_hand, [call])
    assert actions(cached) == "CrCCrr"


@pytest.mark.parametrize("named", [False, True])
def test_branches_of_cfg(model: nn.Module, named: bool) -> None:
    """One graph serves both: what a branch holds is given to it."""
    cached, by_hand, backend = cache_of(model), ByHand(model, ["blocks"]), Counting()
    compiled_model = compiled(cached, backend)

    def call(branch: str, computes: bool, inputs: dict[str, Any]) -> None:
        want = by_hand(computes, branch=branch, **inputs)
        if not named:
            assert torch.equal(compiled_model(**inputs), want)
            return
        with cached.cache_context(branch):
            assert torch.equal(compiled_model(**inputs), want)

    with no_recompile():
        for _ in range(2):
            texts = {name: text_of(name) for name in ("cond", "uncond")}
            for computes, inputs in generation(TOY, STEPS):
                for name, text in texts.items():
                    call(name, computes, inputs | {"text": text})
    assert (backend.count, breaks()) == (1, 0)
    assert actions(cached) == "CCrrCCCCrrrr"


def test_branches_with_texts_of_two_lengths(model: nn.Module) -> None:
    """Two signatures: a graph for each, and the steps are shared."""
    cached, by_hand, backend = cache_of(model), ByHand(model, ["blocks"]), Counting()
    compiled_model = compiled(cached, backend)
    texts = {"cond": text_of("cond", 6), "uncond": text_of("uncond", 3)}
    with no_recompile():
        for computes, inputs in generation(TOY, STEPS):
            for name, text in texts.items():
                given = inputs | {"text": text}
                want = by_hand(computes, branch=name, **given)
                assert torch.equal(compiled_model(**given), want)
    assert (backend.count, breaks()) == (2, 0)


@pytest.mark.parametrize("dynamic", [False, None])
def test_a_graph_for_each_resolution(model: nn.Module, dynamic: bool | None) -> None:
    cached, backend = cache_of(model), Counting()
    compiled_model = compiled(cached, backend, dynamic=dynamic)
    with no_recompile():
        for size in (0, 1, 0, 1):
            follows(compiled_model, ByHand(model, ["blocks"]), generation(TOY, STEPS, size=size))
    assert (backend.count, breaks()) == (2, 0)


def test_compiled_in_place(model: nn.Module) -> None:
    cached, backend = cache_of(model), Counting()
    cached.compile(backend=backend, fullgraph=True)
    with no_recompile():
        for prompt in (0, 1):
            calls = generation(TOY, STEPS, prompt=prompt)
            follows(cached, ByHand(model, ["blocks"]), calls)
    assert (backend.count, breaks()) == (1, 0)
    assert actions(cached) == "CrCCrr"
    model(**toy_inputs(1000.0))
    assert backend.count == 1  # the model itself is not compiled


def test_modes_share_a_model(model: nn.Module) -> None:
    """Inference tensors are another kind: a graph of their own, and no more."""
    cached, backend = cache_of(model), Counting()
    compiled_model = compiled(cached, backend)
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            follows(compiled_model, ByHand(model, ["blocks"]), generation(TOY, STEPS))
        assert actions(cached) == "CrCCrr"
    assert backend.count <= 2
    assert breaks() == 0


def test_with_gradients_it_is_the_model_and_warns_once(model: nn.Module) -> None:
    compiled_model = torch.compile(cache_of(model), backend="eager")
    with torch.enable_grad():
        with pytest.warns(dit_cache_fx.DitCacheWarning, match="gradients"):
            first = compiled_model(**toy_inputs(1000.0))
        second = compiled_model(**toy_inputs(900.0))
    assert first.requires_grad
    assert torch.equal(second, model(**toy_inputs(900.0)))


# --- the step ------------------------------------------------------------------------------------


def reads(backend: Counting) -> int:
    """How often the graph waits for a value."""
    item = torch.ops.aten._local_scalar_dense.default
    return backend.calls(item) + backend.calls(torch.ops.aten.item.default) + backend.calls("item")


@pytest.mark.parametrize("name", ["schedule", "rule"])
def test_a_given_step_and_a_cpu_timestep_are_not_read_in_the_graph(
    model: nn.Module, name: str
) -> None:
    strategy, options = RULE if name == "rule" else ("deepcache", {"no_cache_steps": STEPS})
    eager, cached = (dit_cache_fx.apply(model, strategy, **options) for _ in range(2))
    backend = Counting()
    compiled_model = compiled(cached, backend)
    with no_recompile():
        assert_same(compiled_model, eager, calls_of(TOY))
        cached.clear_states()
        eager.clear_states()
        for index, inputs in enumerate(calls_of(TOY, prompt=1)):
            cached.cur_timestep = eager.cur_timestep = index
            assert_same(compiled_model, eager, [inputs])
    assert actions(cached) == actions(eager)
    assert (backend.count, breaks(), reads(backend)) == (1, 0, 0)


def test_the_given_step_decides(model: nn.Module) -> None:
    """The timestep's value says nothing then, and a step that is given twice stays."""
    cached, by_hand = cache_of(model), ByHand(model, ["blocks"])
    compiled_model = compiled(cached, "eager")
    with no_recompile():
        for step in (0, 1, 2, 4, 5, 3):
            cached.cur_timestep = step
            computes = step in (0, 2, 3)
            follows(compiled_model, by_hand, [(computes, toy_inputs(1.0, seed=step))])


def test_held_tensors_are_not_changed_through_what_the_caller_gets(model: nn.Module) -> None:
    cached, by_hand = cache_of(model), ByHand(model, ["blocks"])
    compiled_model = compiled(cached, "eager")
    for computes, inputs in generation(TOY, STEPS):
        want = by_hand(computes, **inputs)
        output = compiled_model(**inputs)
        assert torch.equal(output, want)
        output.zero_()
        inputs["x"].zero_()


# --- inside a user's own compiled function --------------------------------------------------------


def sampler(cached: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def step(x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return x - 0.1 * cached(x=x, timestep=timestep, text=text)

    return step


def test_in_a_users_own_compiled_function(model: nn.Module) -> None:
    """The state is carried in buffers there, and the step told in the graph."""
    cached, backend = cache_of(model), Counting()
    cached(**toy_inputs(1000.0))
    step = torch.compile(sampler(cached), backend=backend, fullgraph=True)
    with no_recompile():
        for prompt in (0, 1):
            want = sampler(ByHandSteps(model))
            for _, given in generation(TOY, STEPS, prompt=prompt):
                assert torch.equal(step(**given), want(**given))
    assert (backend.count, breaks()) == (1, 0)


class ByHandSteps:
    """DeepCache by hand that counts its own steps."""

    def __init__(self, model: nn.Module) -> None:
        self.by_hand = ByHand(model, ["blocks"])
        self.step = -1

    def __call__(self, **inputs: Any) -> Tensor:
        self.step += 1
        output: Tensor = self.by_hand(self.step in STEPS, **inputs)
        return output


@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "dataclass"])
def test_every_kind_of_output_in_a_users_own_compiled_function(kind: str) -> None:
    """The container is built while the user's function is traced."""
    model = make(OutputsDiT)
    cached, by_hand = cache_of(model), ByHand(model, ["blocks"])
    cached(**toy_inputs(1000.0), kind=kind)
    step = torch.compile(lambda **given: cached(**given), backend="eager", fullgraph=True)
    for computes, inputs in generation(TOY, STEPS):
        want, form = flatten(by_hand(computes, **inputs, kind=kind))
        got, got_form = flatten(step(**inputs, kind=kind))
        assert got_form == form
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("number", [int, float])
def test_a_number_as_the_timestep_in_a_users_own_compiled_function(number: type) -> None:
    """Dynamo lets the number vary from its second value on."""
    model = make(AnyTimeDiT)
    cached, by_hand, backend = cache_of(model), ByHand(model, ["blocks"]), Counting()
    cached(**toy_inputs(1000.0) | {"timestep": number(1000)})
    step = torch.compile(sampler(cached), backend=backend, fullgraph=True)
    for computes, inputs in generation(TOY, STEPS):
        inputs["timestep"] = number(inputs["timestep"])
        want = inputs["x"] - 0.1 * by_hand(computes, **inputs)
        assert torch.equal(step(**inputs), want)
    assert (backend.count, breaks()) == (2, 0)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("strategy", [*STRATEGIES])
def test_every_strategy_in_a_users_own_compiled_function(
    model: nn.Module, strategy: str, inner: str
) -> None:
    """The state of a rule has numbers; the compiler must not take them for constants."""
    name, options = STRATEGIES[strategy]
    eager, cached = (dit_cache_fx.apply(model, name, **options) for _ in range(2))
    cached(**toy_inputs(1000.0))
    step = torch.compile(sampler(cached), backend=inner, fullgraph=True)
    for prompt in (0, 1):
        for inputs in calls_of(TOY, prompt=prompt):
            assert torch.equal(step(**inputs), sampler(eager)(**inputs))
        assert {*actions(eager)} == {"C", "r"}


def test_an_error_in_a_users_own_compiled_function_has_its_whole_text(model: nn.Module) -> None:
    """Its type is Dynamo's."""
    cached = cache_of(model)
    cached(**toy_inputs(1000.0))
    step = torch.compile(sampler(cached), backend="eager", fullgraph=True)
    with (
        cached.batch([cached.new_session()]),
        pytest.raises(torch._dynamo.exc.Unsupported) as error,
    ):
        step(**toy_inputs(1000.0))
    text = (
        "CaptureError('a batch of sessions cannot be part of another compiled function or of an "
        "exported program: compile the cached model by itself')"
    )
    assert text in str(error.value)
    assert text in str(error.value.__cause__)


def test_in_a_users_own_compiled_function_before_any_call(model: nn.Module) -> None:
    step = torch.compile(sampler(cache_of(model)), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="call the cached model once with these arguments before"):
        step(**toy_inputs(1000.0))


def test_disabled_in_a_users_own_compiled_function(model: nn.Module) -> None:
    cached = cache_of(model)
    cached.disable()
    step = torch.compile(sampler(cached), backend="eager", fullgraph=True)
    for inputs in calls_of(TOY, 2):
        assert torch.equal(step(**inputs), sampler(model)(**inputs))
