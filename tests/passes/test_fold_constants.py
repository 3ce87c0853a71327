"""Which values are computed once, and which are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dit_cache_fx
from dit_cache_fx.ir.program import Program
from dit_cache_fx.passes.fold_constants import fold_constants
from dit_cache_fx.strategies import DeepCache
from tests.passes.toy import Toy, captured, inputs

DEEP = DeepCache(no_cache_steps=[0])
#: gives a value for the model's sample and the positions, a weight
Value = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class _Adds(Toy):
    """Adds a value to its result."""

    def __init__(self, value: Value) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return super().forward(x, timestep, text) + self.value(x, self.positions)


def folded(model: Toy, program: Program | None = None) -> dict[str, torch.Tensor]:
    """The constants that the pass adds to a model's program."""
    program = captured(DEEP, model) if program is None else program
    before = set(dict(program.gm.named_buffers(recurse=False)))
    fold_constants(program, DEEP)
    after = program.gm.named_buffers(recurse=False)
    return {name: value for name, value in after if name not in before}


def frequencies(*_: torch.Tensor) -> torch.Tensor:
    return torch.exp(torch.arange(4, dtype=torch.float32) * -0.5)


@pytest.mark.parametrize(
    "value",
    [
        frequencies,
        lambda *_: torch.arange(4)[None].to(torch.float64).pow(-0.5)[0].to(torch.float32),
        lambda *_: torch.zeros(4),
        lambda *_: torch.full((1, 16, 4), 0.5),
        lambda *_: frequencies()[None, None].expand(2, 16, 4),
    ],
    ids=["frequencies", "views and casts between", "zeros", "full", "a view behind"],
)
def test_one_constant_is_left(value: Value) -> None:
    model = _Adds(value)
    (constant,) = folded(model).values()
    want = value(inputs()["x"], model.positions)
    assert torch.equal(constant.expand(want.shape), want)


@pytest.mark.parametrize(
    "value",
    [
        lambda _, positions: positions[0, :4] * 2,
        lambda x, _: x[0, 0] * 2,
        lambda *_: torch.ones(1, 16, 300).mean(2, keepdim=True),
        lambda *_: torch.ones(1, 16, 2000)[..., :4],
    ],
    ids=["a weight", "an input", "a sum", "large"],
)
def test_what_is_not_folded(value: Value) -> None:
    sizes = [constant.numel() for constant in folded(_Adds(value)).values()]
    assert sizes in ([], [16 * 300])  # the ones, not their mean


def test_random_values_are_not_folded() -> None:
    model = _Adds(lambda *_: torch.rand(4) * 2).eval()
    cached = dit_cache_fx.apply(model, strategy=DEEP, check=False)
    with torch.no_grad():
        first, again = (cached(**inputs()) for _ in range(2))
    assert not torch.equal(first, again)


class _Returns(Toy):
    """Also returns the frequencies, in some form."""

    def __init__(self, form: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.form = form

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor
    ) -> list[torch.Tensor]:
        made = frequencies()
        return [super().forward(x, timestep, text) + made, self.form(made)]


@pytest.mark.parametrize(
    "form", [lambda f: f, lambda f: f[None], lambda f: f.view(2, 2).T, lambda f: f.chunk(2)[0]]
)
def test_what_the_caller_gets_is_its_own(form: Callable[[torch.Tensor], torch.Tensor]) -> None:
    cached = dit_cache_fx.apply(_Returns(form).eval(), strategy=DEEP)
    with torch.no_grad():
        results = []
        for step in range(4):
            given = {**inputs(), "timestep": torch.full((2,), 500.0 - step)}
            returned = cached(**given)[1]
            results.append(returned.clone())
            returned.zero_()
    assert all(torch.equal(r, form(frequencies())) for r in results)


class _ReturnsNumbers(_Returns):
    """Also returns numbers that stand in its code."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor
    ) -> list[torch.Tensor]:
        made = torch.tensor([1.0, 0.5, 0.25, 0.125])
        return [Toy.forward(self, x, timestep, text) + made, self.form(made)]


@pytest.mark.parametrize("form", [lambda f: f, lambda f: f[None], lambda f: f.detach().view(2, 2)])
def test_a_caller_that_changes_returned_numbers_changes_no_later_step(
    form: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    model = _ReturnsNumbers(form).eval()
    cached = dit_cache_fx.apply(model, strategy=DeepCache(no_cache_steps=range(4)))
    with torch.no_grad():
        for step in range(4):
            given = {**inputs(), "timestep": torch.full((2,), 500.0 - step)}
            got, want = cached(**given), model(**given)
            assert all(map(torch.equal, got, want))
            got[1].zero_()


class _Embeds(Toy):
    """Passes frequencies to a module."""

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        made = torch.exp(torch.arange(6, dtype=torch.float32) * -0.5)
        return super().forward(x, timestep, text) + self.text_embedder(made[None])[:, :4]


def test_what_a_module_gets_is_its_own() -> None:
    program = captured(DEEP, _Embeds())
    folded(_Embeds(), program)
    assert [n for n in program.graph.nodes if n.target is torch.ops.aten.exp.default]


def test_a_program_without_constants_stays_as_it_is() -> None:
    program = captured(DEEP)
    before = program.gm
    fold_constants(program, DEEP)
    assert program.gm is before


def _in_half(*_: torch.Tensor) -> torch.Tensor:
    return torch.exp(torch.arange(4, dtype=torch.bfloat16))  # on a GPU, autocast would use float32


def test_the_state_of_torch_does_not_matter() -> None:
    model = _Adds(_in_half)
    program, want = captured(DEEP, model), _in_half()
    with (
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
        FlopCounterMode(display=False),
    ):
        (constant,) = folded(model, program).values()
    assert not constant.is_inference()
    assert constant.dtype == torch.bfloat16
    assert torch.equal(constant, want)


def test_a_reused_step_computes_no_constant() -> None:
    cached = dit_cache_fx.apply(_Adds(frequencies).eval(), strategy=DEEP)
    with torch.no_grad():
        cached(**inputs())
    text = str(cached.explain())
    assert "constant_exp" in text[text.index("a reused step executes") :]
    assert "arange" not in text
