"""TeaCache's published coefficients, and the values of a model that they were fitted to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_cache_fx
from dit_cache_fx import TEACACHE_COEFFICIENTS, CaptureError, OptionError, TeaCache
from dit_cache_fx.strategies.teacache import SIGNALS
from tests.test_errors import refused
from tests.toys import TOY, Block, ToyDiT, actions, generation, make
from tests.zoo import case

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("name", TEACACHE_COEFFICIENTS)
def test_a_set_is_a_polynomial_with_its_source(name: str) -> None:
    published = TEACACHE_COEFFICIENTS[name]
    assert len(published.values) == 5
    assert all(isinstance(v, float) and math.isfinite(v) for v in published.values)
    assert published.signal in SIGNALS
    assert published.source.startswith("https://github.com/")
    speedups = list(published.thresholds.values())
    assert all(t > 0 for t in published.thresholds)
    assert speedups == sorted(speedups)
    assert all(1 < s < 4 for s in speedups)


def test_the_sets_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        TEACACHE_COEFFICIENTS["flux"] = None  # type: ignore[index]
    with pytest.raises(TypeError):
        TEACACHE_COEFFICIENTS["flux"].thresholds[0.1] = 2.0  # type: ignore[index]


@pytest.mark.parametrize("name", TEACACHE_COEFFICIENTS)
def test_a_set_is_taken_by_its_name(name: str) -> None:
    published = TEACACHE_COEFFICIENTS[name]
    by_name = TeaCache(rel_l1_thresh=0.2, coefficients=name)
    assert by_name.coefficients == published.values
    assert by_name.looks_at() == published.signal
    assert by_name == TeaCache(rel_l1_thresh=0.2, coefficients=published)
    other = TeaCache(rel_l1_thresh=0.2, coefficients=name, signal="input")
    assert other.looks_at() == "input"


def test_numbers_of_ones_own_are_for_the_modulated_input() -> None:
    assert TeaCache(rel_l1_thresh=0.2, coefficients=[1, 0]).looks_at() == "modulated"
    assert TeaCache(rel_l1_thresh=0.2).looks_at() == "modulated"


def test_the_polynomial_has_its_highest_power_first() -> None:
    """The published value at 0.1, added to what has been added up."""
    rule = TeaCache(rel_l1_thresh=1e9, coefficients="flux")
    before, now = torch.tensor([1.0, -1.0]), torch.tensor([1.1, -1.1])
    memory = rule.init_state(before)
    _, (kept, total, _) = rule.should_compute(now, memory, torch.tensor(False))
    x = (now - before).abs().mean().item() / before.abs().mean().item()
    a, b, c, d, e = TEACACHE_COEFFICIENTS["flux"].values
    assert total.item() == pytest.approx(a * x**4 + b * x**3 + c * x**2 + d * x + e, rel=1e-9)
    assert total.item() == pytest.approx(0.20685, abs=1e-4)
    assert torch.equal(kept, now)


@pytest.mark.parametrize("name", ["Flux", "flux.1", "", "FluxTransformer2DModel"])
def test_names_that_there_are_not(name: str) -> None:
    refused(
        r"coefficients=.*: one of \['cogvideox-2b', .*'flux', .*'wan2.1-t2v-1.3b'.*\], or the numb",
        make(ToyDiT),
        "teacache",
        rel_l1_thresh=0.1,
        coefficients=name,
    )


def test_a_name_without_a_threshold() -> None:
    with pytest.raises(OptionError, match="only used with rel_l1_thresh: pass both"):
        TeaCache(no_cache_steps={0}, coefficients="flux")


# --- what the rule looks at ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Watching(TeaCache):
    """Notes what the rule is given."""

    rel_l1_thresh: float | None = 1e9
    seen: list[Tensor] = field(default_factory=list)

    def init_state(self, signal: Tensor) -> Any:
        self.seen.append(signal.clone())
        return super().init_state(signal)

    def should_compute(self, signal: Tensor, state: Any, forced: Tensor) -> Any:
        self.seen.append(signal.clone())
        return super().should_compute(signal, state, forced)


def outputs_of(model: nn.Module, path: str, calls: list[dict[str, Any]]) -> list[Tensor]:
    """What a module of the model returns in these calls."""
    seen: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_hook(lambda *call: seen.append(call[-1]))
    for inputs in calls:
        model(**inputs)
    hook.remove()
    return seen


def watched(model: nn.Module, signal: str, calls: list[dict[str, Any]]) -> list[Tensor]:
    strategy = Watching(signal=signal)
    cached = dit_cache_fx.apply(model, strategy)
    for inputs in calls:
        cached(**inputs)
    assert actions(cached) == "Crrr"
    return strategy.seen


def toy_calls() -> list[dict[str, Any]]:
    return [inputs for _, inputs in generation(TOY, (), steps=4)]


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want) == 4
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.flatten(), b.flatten())
    assert not torch.equal(want[0], want[-1])


class ConditionedHeadDiT(ToyDiT):
    """The output is conditioned too: on the time's embedding, as the blocks behind it are."""

    def condition(self, timestep: Tensor, text: Tensor) -> Tensor:
        self.embedding = self.time(timestep)
        return torch.tanh(self.embedding).square() + self.text_in(text).mean(dim=1)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        c = self.condition(timestep, text)
        return self.head(self.trunk(self.embed(x), c)) * (1 + self.embedding[:, None])


def test_the_conditioning_of_the_blocks() -> None:
    model, calls = make(ToyDiT), toy_calls()
    want = [model.condition(c["timestep"], c["text"]) for c in calls]  # type: ignore[operator]
    assert_equal(watched(model, "conditioning", calls), want)


def test_the_embedding_of_the_timestep() -> None:
    model, calls = make(ToyDiT), toy_calls()
    assert_equal(watched(model, "embedding", calls), outputs_of(model, "time", calls))


@pytest.mark.filterwarnings("ignore:.*sets attribute 'embedding':dit_cache_fx.DitCacheWarning")
def test_the_embedding_is_what_blocks_and_output_share() -> None:
    model, calls = make(ConditionedHeadDiT), toy_calls()
    assert_equal(watched(model, "embedding", calls), outputs_of(model, "time", calls))


@pytest.mark.parametrize(
    ("name", "signal", "path"),
    [
        ("WanTransformer3DModel", "embedding", "condition_embedder.time_embedder"),
        ("WanTransformer3DModel", "conditioning", "condition_embedder.time_proj"),
        ("CogVideoXTransformer3DModel", "conditioning", "time_embedding"),
    ],
)
def test_the_signals_that_published_coefficients_are_for(name: str, signal: str, path: str) -> None:
    model = case(name).build()
    calls = [case(name).inputs(t, seed=i) for i, t in enumerate(case(name).timesteps(4))]
    assert_equal(watched(model, signal, calls), outputs_of(model, path, calls))


class BareBlock(Block):
    def forward(self, h: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(h, h.mean(dim=1))


class UnconditionedDiT(ToyDiT):
    """Its blocks take the stream alone; the time is in that."""

    def block(self) -> nn.Module:
        return BareBlock()

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        h = h + c[:, None]
        for block in self.blocks:
            h = block(h)
        return h


@pytest.mark.parametrize("signal", ["conditioning", "embedding"])
def test_blocks_without_conditioning(signal: str) -> None:
    cached = dit_cache_fx.apply(
        make(UnconditionedDiT), "teacache", rel_l1_thresh=0.1, signal=signal
    )
    with pytest.raises(CaptureError, match=r"signal \('conditioning'\) cannot be found: .*'input'"):
        cached(**toy_calls()[0])
