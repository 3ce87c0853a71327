"""What users put on a pipeline beside the cache, before they apply it and after."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn

import dit_cache_fx
from tests.pipelines.families import FLUX, SD3, WAN, Family
from tests.pipelines.family import run
from tests.pipelines.int8 import quantise
from tests.pipelines.session import Session

each_moment = pytest.mark.parametrize("when", ["before", "after", "between"])
#: the other moments are left to `-m exhaustive`: `tests/test_cached_model.py` has them with toys
mostly_between = pytest.mark.parametrize(
    "when",
    [*(pytest.param(w, marks=pytest.mark.exhaustive) for w in ("before", "after")), "between"],
)
Change = Callable[[DiffusionPipeline], Any]


def changed_session(family: Family, change: Change, when: str) -> Session:
    """A session whose pipeline was changed before `apply`, after it, or between generations."""
    pipe = family.build()
    if when == "before":
        change(pipe)
    session = Session(family, pipe=pipe)
    session.pipe.transformer = session.cached
    if when == "between":
        session.check("before the change")
    if when != "before":
        change(pipe)
    return session


# --- LoRA -----------------------------------------------------------------------------------------


def lora_weights(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """A LoRA of rank 2 in some of the blocks' layers and in one behind them."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("to_q", "proj_out")):
            shapes = {"A": (2, module.in_features), "B": (module.out_features, 2)}
            for part, shape in shapes.items():
                key = f"transformer.{name}.lora_{part}.weight"
                weights[key] = torch.randn(shape, generator=generator)
    return weights


@mostly_between
def test_lora_loaded_switched_fused_and_unloaded(when: str) -> None:
    pytest.importorskip("peft")

    def load(pipe: DiffusionPipeline, name: str = "first", seed: int = 1) -> None:
        model = SD3.build().transformer
        pipe.load_lora_weights(lora_weights(model, seed), adapter_name=name)

    session = changed_session(SD3, load, when)
    pipe, results = session.pipe, []
    changes: list[tuple[str, Callable[[], Any]]] = [
        ("loaded", lambda: None),
        ("another one", lambda: load(pipe, "second", 2)),
        ("switched", lambda: pipe.set_adapters("second")),
        ("both", lambda: pipe.set_adapters(["first", "second"], [0.5, 0.7])),
        ("fused", pipe.fuse_lora),
        ("unfused", pipe.unfuse_lora),
        ("unloaded", pipe.unload_lora_weights),
    ]
    for what, change in changes:
        pipe.transformer = session.cached
        change()
        session.check(what)
        results.append(session.plain())
    assert not torch.equal(results[0], results[2])
    plain = run(SD3, SD3.build())
    assert not torch.equal(results[0], plain)
    # unfusing subtracts what fusing added
    assert torch.allclose(results[-1], plain, atol=1e-3)


# --- options of the model -------------------------------------------------------------------------


class HalvedAttention(JointAttnProcessor2_0):
    """An attention processor of a user's own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        image, text = super().__call__(*args, **kwargs)
        return image / 2, text


def cast_layers(pipe: DiffusionPipeline) -> None:
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


CHANGES: dict[str, tuple[Family, Change]] = {
    "attention processors": (
        SD3,
        lambda pipe: pipe.transformer.transformer_blocks[0].attn.set_processor(HalvedAttention()),
    ),
    "fused projections": (WAN, lambda pipe: pipe.transformer.fuse_qkv_projections()),
    "attention backend": (
        WAN,
        lambda pipe: pipe.transformer.set_attention_backend("_native_math"),
    ),
    "layerwise casting": (WAN, cast_layers),
    "int8 weights": (WAN, lambda pipe: quantise(pipe.transformer)),
    "int8 weights in blocks": (SD3, lambda pipe: quantise(pipe.transformer.transformer_blocks)),
}


@mostly_between
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_model_takes_effect(name: str, when: str) -> None:
    family, change = CHANGES[name]
    session = changed_session(family, change, when)
    session.check(name)
    session.check((name, "again"), prompt=1, seed=1)
    exact = name in ("fused projections", "attention backend")
    unchanged = run(family, family.build())
    assert exact == torch.allclose(session.plain(), unchanged, rtol=1e-3, atol=1e-3)


def test_torchao_int8_weights() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    pipe = WAN.build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's own
        torchao.quantize_(pipe.transformer.blocks, torchao.Int8WeightOnlyConfig())
        session = Session(WAN, pipe=pipe)
        session.check("int8")
        session.check("again", prompt=1)


# --- torch.compile of the whole -------------------------------------------------------------------


@each_moment
def test_compiled_blocks(when: str) -> None:
    torch._dynamo.reset()
    want = [Session(WAN).by_hand(prompt=prompt) for prompt in (0, 1)]

    def compile_blocks(pipe: DiffusionPipeline) -> None:
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")

    session = changed_session(WAN, compile_blocks, when)
    assert all(block._compiled_call_impl is not None for block in session.model.blocks)
    for prompt in (0, 1):
        assert torch.equal(session.cache(prompt=prompt), want[prompt])
    assert session.cached.cache_report().steps_computed == len(session.computed)


@pytest.mark.parametrize(
    "family",
    [FLUX, *(pytest.param(f, marks=pytest.mark.exhaustive) for f in (SD3, WAN))],
    ids=lambda family: family.name,
)
def test_the_compiled_cached_model_in_one_graph(family: Family) -> None:
    """Without a recompilation after the first generation."""
    torch._dynamo.reset()
    session = Session(family)
    changes: list[dict[str, Any]] = [{}, {"prompt": 1, "seed": 1}, {"steps": 3}]
    want = [session.by_hand(**change) for change in changes]
    compiled = torch.compile(session.cached, fullgraph=True, backend="eager")
    for place, change in enumerate(changes):
        session.pipe.transformer = compiled
        with torch._dynamo.config.patch(error_on_recompile=place > 0):
            assert torch.equal(run(family, session.pipe, **change), want[place]), change
    assert session.cached.cache_report().steps_computed == 2


# --- disabled, copied -----------------------------------------------------------------------------


def test_disabled_it_is_the_uncached_pipeline() -> None:
    session = Session(SD3)
    session.check("enabled")
    session.cached.disable()
    assert torch.equal(session.cache(), session.plain())
    session.cached.enable()
    session.check("enabled again")


def test_applied_again_it_caches_the_original() -> None:
    session = Session(SD3)
    session.check("first")
    again = Session(SD3, pipe=session.pipe)
    assert again.cached._model is session.model  # type: ignore[attr-defined]
    again.model = session.model
    again.check("again")
    assert isinstance(session.pipe.transformer, dit_cache_fx.CachedModel.__mro__[1])
