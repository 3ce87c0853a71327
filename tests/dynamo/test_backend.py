"""`torch.compile(model, backend=dit_cache_fx.backend(...))` on a toy: graphs, steps, life cycle."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import dit_cache_fx
from dit_cache_fx import Backend, DitCacheWarning, OptionError
from tests.dynamo.inner import Inner
from tests.toys import (
    DIM,
    TOKENS,
    Block,
    ByHand,
    InPlaceDiT,
    JoinedDiT,
    NoHeadDiT,
    ToyDiT,
    UShapeDiT,
    make,
    toy_inputs,
)

STEPS = frozenset({0, 1, 4})
TIMES = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]


def compiled(model: nn.Module, cache: Backend, **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend=cache, fullgraph=True, **options)


def deepcache(**options: Any) -> Backend:
    return dit_cache_fx.backend("deepcache", no_cache_steps=STEPS, **options)


def actions(cache: Backend) -> str:
    timeline = cache.cache_report().timeline
    return "".join("C" if record.action == "computed" else "r" for record in timeline)


def compare(model: Callable[..., Any], by_hand: ByHand, **options: Any) -> None:
    """A generation of six steps, each bit by bit what is done by hand."""
    for step, time in enumerate(TIMES):
        inputs = toy_inputs(time, seed=step, **options)
        want = by_hand(step in STEPS, **inputs)
        assert torch.equal(model(**inputs), want), f"step {step}"


# --- graphs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ToyDiT, JoinedDiT, UShapeDiT, NoHeadDiT, InPlaceDiT])
def test_deepcache_is_what_is_done_by_hand(kind: type[nn.Module]) -> None:
    cache = deepcache(inner="eager")
    model = compiled(make(kind), cache)
    by_hand = ByHand(make(kind), ["blocks"])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for prompt in range(3):
            compare(model, by_hand, prompt=prompt)
            assert actions(cache) == "CCrrCr"
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_each_variant_is_compiled_once_when_it_is_needed_first() -> None:
    inner = Inner()
    cache = deepcache(inner=inner)
    model = compiled(make(ToyDiT), cache)
    model(**toy_inputs(1.0))
    assert len(inner.graphs) == 1
    for _ in range(2):
        for time in TIMES:
            model(**toy_inputs(time))
    assert len(inner.graphs) == 2
    assert inner.calls == [0, *[0, 0, 1, 1, 0, 1] * 2]


def test_the_reused_graph_reads_no_block() -> None:
    inner = Inner()
    model = compiled(make(ToyDiT), deepcache(inner=inner))
    for time in TIMES:
        model(**toy_inputs(time))
    compute, reuse = inner.inputs_of(0), inner.inputs_of(1)
    assert any("blocks" in name for name in compute)
    assert not any("blocks" in name or "embed" in name for name in reuse)
    assert "x" not in reuse
    assert "text" not in reuse
    linear = [n for n in inner.graphs[1].graph.nodes if "addmm" in str(n.target)]
    assert len(linear) == 1  # the head


def test_a_rule_has_a_graph_of_its_own() -> None:
    inner = Inner()
    cache = dit_cache_fx.backend("teacache", rel_l1_thresh=0.01, inner=inner)
    model = compiled(make(ToyDiT), cache)
    cached = dit_cache_fx.apply(make(ToyDiT), "teacache", rel_l1_thresh=0.01)
    for time in TIMES:
        assert torch.equal(model(**toy_inputs(time)), cached(**toy_inputs(time)))
    wanted = [record.action for record in cached.cache_report().timeline]
    assert [record.action for record in cache.cache_report().timeline] == wanted
    assert set(wanted) == {"computed", "reused"}
    assert len(inner.graphs) == 3


def test_only_what_leaves_the_run_is_held() -> None:
    cache = deepcache(inner="eager")
    model = compiled(make(ToyDiT), cache)
    for time in TIMES:
        model(**toy_inputs(time))
    report = cache.cache_report()
    assert report.bytes_held == 4 * TOKENS * DIM
    assert report.bytes_per_block == 3 * report.bytes_held
    assert report.blocks == {"blocks": 3}
    assert report.captures[0].inputs == "timestep[1], text[1, 4, 8], x[1, 6, 8]"


def test_blocks_that_are_never_cached() -> None:
    cache = deepcache(inner="eager", no_cache_block_id={"double_blocks": {1}})
    model = compiled(make(ToyDiT), cache)
    by_hand = ByHand(make(ToyDiT), ["blocks"], never=["blocks.1"])
    compare(model, by_hand)
    assert cache.cache_report().cached_blocks == {"blocks": (0, 2)}


class Wrapped(nn.Module):
    """A function around a model, and the model's blocks given as a list."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make(ToyDiT)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        return 2 * self.model(x, timestep, text)


@pytest.mark.parametrize("blocks", [None, "blocks", "model.blocks", "list"])
def test_a_model_inside_of_another(blocks: Any) -> None:
    outer = Wrapped()
    given = outer.model.blocks if blocks == "list" else blocks
    cache = deepcache(inner="eager", blocks=given)
    model = compiled(outer, cache)
    by_hand = ByHand(outer, ["model.blocks"])
    compare(model, by_hand)
    assert cache.cache_report().blocks == {"model.blocks": 3}


def test_a_function_that_calls_the_model() -> None:
    inside, cache = make(ToyDiT), deepcache(inner="eager")

    @torch.compile(backend=cache, fullgraph=True)
    def step(latents: Tensor, time: Tensor, text: Tensor) -> Any:
        return latents - inside(latents, time, text)

    by_hand = ByHand(inside, ["blocks"])
    for index, time in enumerate(TIMES):
        inputs = toy_inputs(time, seed=index)
        want = inputs["x"] - by_hand(index in STEPS, **inputs)
        assert torch.equal(step(*inputs.values()), want)
    assert actions(cache) == "CCrrCr"


# --- steps, branches, sizes --------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True])
def test_branches_have_states_of_their_own(named: bool) -> None:
    cache = deepcache(inner="eager")
    model = compiled(make(ToyDiT), cache)
    texts = [toy_inputs(1.0, prompt=prompt)["text"] for prompt in range(2)]
    hands = [ByHand(make(ToyDiT), ["blocks"]) for _ in texts]
    for step, time in enumerate(TIMES):
        for name, text, by_hand in zip("ab", texts, hands, strict=True):
            inputs = {**toy_inputs(time, seed=step), "text": text}
            want = by_hand(step in STEPS, **inputs)
            if named:
                with cache.cache_context(name):
                    assert torch.equal(model(**inputs), want)
            else:
                assert torch.equal(model(**inputs), want)
    assert cache.cache_report().bytes_held == 2 * 4 * TOKENS * DIM


@pytest.mark.parametrize("dynamic", [False, None, True])
def test_two_sizes_in_turn(dynamic: bool | None) -> None:
    cache = deepcache(inner="eager")
    model = compiled(make(ToyDiT), cache, dynamic=dynamic)
    hands = [ByHand(make(ToyDiT), ["blocks"]) for _ in range(3)]
    for step, time in enumerate(TIMES):
        for size, by_hand in enumerate(hands):
            inputs = toy_inputs(time, seed=step, size=size)
            assert torch.equal(model(**inputs), by_hand(step in STEPS, **inputs))


class ListDiT(ToyDiT):
    """Takes a list of samples, and gives as many back."""

    def forward(self, x: list[Tensor], timestep: Tensor, text: Tensor) -> Any:  # type: ignore[override]
        return list(super().forward(torch.stack(x), timestep, text).unbind())


@pytest.mark.parametrize("samples", [1, 2, 4])
def test_each_entry_of_a_list_is_a_sample(samples: int) -> None:
    """Conditioning that changes at each step would keep anything from being reused."""
    cache = deepcache(inner="eager")
    model, by_hand = compiled(make(ListDiT), cache), ByHand(make(ListDiT), ["blocks"])
    for step, time in enumerate(TIMES):
        inputs = toy_inputs(time, seed=step, batch=samples)
        inputs["x"] = [*inputs["x"]]
        want = by_hand(step in STEPS, **inputs)
        assert all(map(torch.equal, model(**inputs), want)), f"step {step}"
    assert actions(cache) == "CCrrCr"


def test_the_explicit_step_index() -> None:
    cache = deepcache(inner="eager")
    model = compiled(make(ToyDiT), cache)
    by_hand = ByHand(make(ToyDiT), ["blocks"])
    for step in range(6):
        cache.cur_timestep = step
        inputs = toy_inputs(0.5, seed=step)
        assert torch.equal(model(**inputs), by_hand(step in STEPS, **inputs))
    assert actions(cache) == "CCrrCr"


def test_inference_mode() -> None:
    cache = deepcache(inner="eager")
    model = compiled(make(ToyDiT), cache)
    with torch.inference_mode():
        compare(model, ByHand(make(ToyDiT), ["blocks"]))


def test_weights_that_change() -> None:
    inside, cache = make(ToyDiT), deepcache(inner="eager")
    model = compiled(inside, cache)
    compare(model, ByHand(inside, ["blocks"]))
    for parameter in inside.parameters():
        parameter.mul_(0.5)
    inside.blocks[1].mix = nn.Linear(DIM, DIM)
    compare(model, ByHand(inside, ["blocks"]))


# --- life cycle --------------------------------------------------------------------------------


def test_disabled_it_is_the_model() -> None:
    inside, cache = make(ToyDiT), deepcache(inner="eager")
    model = compiled(inside, cache)
    compare(model, ByHand(inside, ["blocks"]))
    cache.disable()
    assert cache.cache_report().bytes_held == 0
    for time in TIMES:
        assert torch.equal(model(**toy_inputs(time)), inside(**toy_inputs(time)))
    cache.enable()
    compare(model, ByHand(inside, ["blocks"]))


def test_disabled_with_sizes_that_vary() -> None:
    inside, cache = make(ToyDiT), deepcache(inner="aot_eager")
    model = compiled(inside, cache, dynamic=True)
    cache.disable()
    for size in range(2):
        inputs = toy_inputs(1.0, size=size)
        torch.testing.assert_close(model(**inputs), inside(**inputs))


def test_clear_and_reset() -> None:
    inner = Inner()
    cache = deepcache(inner=inner)
    model = compiled(make(ToyDiT), cache)
    for time in TIMES[:4]:
        model(**toy_inputs(time))
    cache.clear_states()
    model(**toy_inputs(TIMES[4]))
    assert actions(cache) == "C"
    assert len(inner.graphs) == 2
    cache.reset_states()
    assert not cache.cache_report().captures
    model(**toy_inputs(TIMES[4]))
    assert len(inner.graphs) == 3


def test_an_error_in_a_step_leaves_no_trace() -> None:
    class Failing(Inner):
        fails = False

        def __call__(self, gm: Any, inputs: Any) -> Any:
            run = super().__call__(gm, inputs)

            def failing(*operands: Any) -> Any:
                if self.fails:
                    raise RuntimeError("out of memory")
                return run(*operands)

            return failing

    inner = Failing()
    cache = deepcache(inner=inner)
    model, by_hand = compiled(make(ToyDiT), cache), ByHand(make(ToyDiT), ["blocks"])
    for step, time in enumerate(TIMES):
        inputs = toy_inputs(time, seed=step)
        inner.fails = True
        with pytest.raises(RuntimeError, match="out of memory"):
            model(**inputs)
        inner.fails = False
        assert torch.equal(model(**inputs), by_hand(step in STEPS, **inputs))


def test_two_models_are_independent() -> None:
    caches = [deepcache(inner="eager") for _ in range(2)]
    models = [compiled(make(ToyDiT), cache) for cache in caches]
    models[0](**toy_inputs(1.0))
    assert caches[1].cache_report().calls_computed == 0
    compare(models[1], ByHand(make(ToyDiT), ["blocks"]))


def test_graphs_that_dynamo_drops_are_forgotten() -> None:
    cache = deepcache(inner="eager")
    model = compiled(make(ToyDiT), cache)
    model(**toy_inputs(1.0))
    del model
    torch._dynamo.reset()
    gc.collect()
    assert not cache.cache_report().captures


# --- what is not cached ------------------------------------------------------------------------


def warned(run: Callable[[], Any], match: str) -> Any:
    with pytest.warns(DitCacheWarning, match=match) as caught:
        result = run()
    assert len([w for w in caught if issubclass(w.category, DitCacheWarning)]) == 1
    return result


def test_gradients_are_wanted() -> None:
    inside, cache = make(ToyDiT), deepcache(inner="eager")
    model = compiled(inside, cache)
    with torch.enable_grad():
        output = warned(lambda: model(**toy_inputs(1.0)), "gradients are enabled and required")
        assert torch.equal(output, inside(**toy_inputs(1.0)))
        output.sum().backward()
        assert model(**toy_inputs(0.9)).requires_grad
    assert inside.head.weight.grad is not None
    assert not cache.cache_report().captures


def test_a_model_without_blocks_is_compiled_as_it_is() -> None:
    inner, plain = Inner(), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    cache = deepcache(inner=inner)
    x = torch.randn(2, 4)
    model = compiled(plain, cache)
    assert torch.equal(warned(lambda: model(x), "no block list found"), plain(x))
    assert torch.equal(model(x), plain(x))
    assert len(inner.graphs) == 1


class Broken(ToyDiT):
    """A graph break of its own before the blocks: the timestep goes into another graph."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        c = self.condition(timestep, text)
        torch._dynamo.graph_break()
        return self.gain * self.head(self.trunk(self.embed(x), c))


class BrokenBlocks(ToyDiT):
    """A graph break in each block."""

    def block(self) -> nn.Module:
        class Breaking(Block):
            def forward(self, h: Tensor, c: Tensor) -> Tensor:
                torch._dynamo.graph_break()
                return super().forward(h, c)

        return Breaking()


def test_a_piece_of_a_split_model_is_cached(recwarn: pytest.WarningsRecorder) -> None:
    cache = deepcache(inner="eager")
    model = torch.compile(make(Broken), backend=cache)
    for prompt in range(2):
        compare(model, ByHand(make(Broken), ["blocks"]), prompt=prompt)
        assert actions(cache) == "CCrrCr"
    assert not [w for w in recwarn if issubclass(w.category, DitCacheWarning)]


def test_a_model_that_is_split_inside_its_blocks() -> None:
    inside, cache = make(BrokenBlocks), deepcache(inner="eager")
    model = torch.compile(inside, backend=cache)

    def generation() -> None:
        for time in TIMES:
            assert torch.equal(model(**toy_inputs(time)), inside(**toy_inputs(time)))

    warned(generation, r"Dynamo splits the model .* dit_cache_fx.apply\(model, ...\)")


# --- bad input ---------------------------------------------------------------------------------


def _refusing(gm: Any, inputs: Any) -> Any:
    return gm


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"inner": "inductr"}, r"inner='inductr': one of \[.*'inductor'.*\], or a callable"),
        ({"inner": 3}, r"inner=3: the name of a backend, or a callable \(graph, inputs\)"),
        ({"mode": "fast"}, r"mode='fast': one of \['default', 'reduce-overhead'"),
        ({"options": {"max_autotun": True}}, r"options=.*max_autotun.*options of inductor"),
        ({"options": {"max_autotune": 3}}, r"options=.*options of inductor"),
        (
            {"inner": _refusing, "options": {"a": 1}},
            r"options={'a': 1}: None: the inner backend _refusing takes none",
        ),
        ({"inner": _refusing, "mode": "fast"}, r"mode='fast': None: the inner backend _refusing"),
        ({"blocks": 3}, r"blocks=3: attribute paths of module lists, or the lists"),
        ({"blocks": []}, r"blocks=\[\]: attribute paths of module lists, or the lists"),
        ({"timestep": 3}, r"timestep=3: the name of forward's timestep argument"),
        ({"max_order": 3}, r"max_order=3: deepcache has no such option"),
    ],
)
def test_bad_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        deepcache(**options)


def test_blocks_that_are_not_there() -> None:
    model = compiled(make(ToyDiT), deepcache(inner="eager", blocks="layers"))
    with pytest.raises(Exception, match=r"blocks='layers': the compiled graph has .*'blocks'"):
        model(**toy_inputs(1.0))


def test_block_ids_that_are_not_there() -> None:
    model = compiled(make(ToyDiT), deepcache(inner="eager", no_cache_block_id={"blocks": {3}}))
    with pytest.raises(OptionError, match="blocks has 3 blocks, ids 0 to 2"):
        model(**toy_inputs(1.0))


def test_a_timestep_of_another_name() -> None:
    cache = deepcache(inner="eager", timestep="noise")
    model = compiled(make(ToyDiT), cache)
    warned(lambda: model(**toy_inputs(1.0)), r"name it \(timestep='...'\)")


# --- by name -----------------------------------------------------------------------------------


def test_it_is_registered() -> None:
    assert "dit_cache_fx" in torch._dynamo.list_backends()
    options = {"strategy": "deepcache", "no_cache_steps": STEPS, "inner": "eager"}
    model = torch.compile(make(ToyDiT), backend="dit_cache_fx", options=options)
    compare(model, ByHand(make(ToyDiT), ["blocks"]))


def test_by_name_without_a_strategy() -> None:
    model = torch.compile(make(ToyDiT), backend="dit_cache_fx")
    with pytest.raises(Exception, match=r"options=None: .*options=.*taylorcache"):
        model(**toy_inputs(1.0))


def test_mode_and_options_of_torch_compile_go_to_the_inner_backend() -> None:
    given: list[Any] = []

    def inner(gm: Any, inputs: Any, **named: Any) -> Any:
        given.append(named)
        return gm

    model = torch.compile(make(ToyDiT), backend=deepcache(inner=inner), options={"depth": 2})
    model(**toy_inputs(1.0))
    assert given == [{"options": {"depth": 2}}]


# --- inductor ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", [pytest.param("teacache", marks=pytest.mark.exhaustive), "taylorcache"]
)
def test_inductor(strategy: str) -> None:
    cache = dit_cache_fx.backend(strategy, no_cache_steps=STEPS)
    model = compiled(make(ToyDiT), cache)
    cached = dit_cache_fx.apply(make(ToyDiT), strategy, no_cache_steps=STEPS)
    for step, time in enumerate(TIMES):
        inputs = toy_inputs(time, seed=step)
        torch.testing.assert_close(model(**inputs), cached(**inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("strategy", ["deepcache", "teacache", "taylorcache"])
def test_cuda_graphs(strategy: str, mode: str) -> None:
    def on_gpu(time: float, **options: Any) -> dict[str, Tensor]:
        return {name: value.cuda() for name, value in toy_inputs(time, **options).items()}

    cache = dit_cache_fx.backend(strategy, no_cache_steps=STEPS, mode=mode)
    model = compiled(make(ToyDiT).cuda(), cache)
    cached = dit_cache_fx.apply(make(ToyDiT).cuda(), strategy, no_cache_steps=STEPS)
    texts = [on_gpu(1.0, prompt=prompt)["text"] for prompt in range(2)]
    for _ in range(3):
        for step, time in enumerate(TIMES):
            both = []
            for name, text in zip("ab", texts, strict=True):
                inputs = {**on_gpu(time, seed=step), "text": text}
                with cache.cache_context(name), cached.cache_context(name):
                    both.append((model(**inputs), cached(**inputs)))
            for got, want in both:  # the first result is still right after the second call
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
