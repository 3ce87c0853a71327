"""Models that a cached step cannot stand for are refused, and errors say whose they are."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_cache_fx
from dit_cache_fx import CachedModel, CaptureError
from tests.toys import DIM, Block, InPlaceDiT, MaskedDiT, ToyDiT, make, toy_inputs

pytestmark = pytest.mark.usefixtures("no_grad")


def cached_of(kind: type[nn.Module]) -> CachedModel:
    return dit_cache_fx.apply(make(kind), "deepcache", no_cache_steps={0})


# --- blocks that keep something for later --------------------------------------------------------


class KeepingBlock(Block):
    """Writes what it gives into memory for later, where there is any."""

    def forward(self, h: Tensor, c: Tensor, kept: Tensor | None = None) -> Tensor:  # type: ignore[override]
        h = super().forward(h, c)
        if kept is not None:
            kept.copy_(h.mean(dim=1))
        return h


class KeepingDiT(ToyDiT):
    """Each block may fill a row of the caller's `kept`."""

    def block(self) -> nn.Module:
        return KeepingBlock()

    def forward(  # type: ignore[override]
        self, x: Tensor, timestep: Tensor, text: Tensor, kept: Tensor | None = None
    ) -> Any:
        h, c = self.embed(x), self.condition(timestep, text)
        for index, block in enumerate(self.blocks):
            h = block(h, c, None if kept is None else kept[index])
        return self.head(h)


class OwnKeepingDiT(KeepingDiT):
    """The memory is a buffer of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(len(self.blocks), 1, DIM))

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, timestep, text, self.kept)


def test_a_block_that_writes_into_an_argument_is_refused() -> None:
    """Only its first call would fill it: on later steps the block gets a copy, or does not run."""
    with pytest.raises(
        CaptureError,
        match=r"'blocks\.0' writes into the argument 'kept' in place.*disable\(\) and enable\(\)",
    ):
        cached_of(KeepingDiT)(**toy_inputs(1.0), kept=torch.zeros(3, 1, DIM))


def test_a_block_that_writes_into_a_buffer_of_the_model_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"'blocks\.0' writes into the model's 'kept' in place"):
        cached_of(OwnKeepingDiT)(**toy_inputs(1.0))


def test_the_remedy_works() -> None:
    """The filling call uncached, the others cached."""
    model = make(KeepingDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0})
    kept, want = torch.zeros(3, 1, DIM), torch.zeros(3, 1, DIM)
    cached.disable()
    cached(**toy_inputs(1000.0), kept=kept)
    cached.enable()
    model(**toy_inputs(1000.0), kept=want)
    assert kept.abs().sum() > 0
    assert torch.equal(kept, want)
    for step in range(3):
        cached(**toy_inputs(900.0 - step, seed=step))
    report = cached.cache_report()
    assert (report.steps_computed, report.steps_reused) == (1, 2)


def test_a_block_that_returns_what_it_changed_is_not_refused() -> None:
    cached_of(InPlaceDiT)(**toy_inputs(1.0))


# --- whose an error is ---------------------------------------------------------------------------


class UntraceableDiT(ToyDiT):
    """Writes a tensor to a file: there is none while a graph is made."""

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        torch.save(h, io.BytesIO())
        return super().trunk(h, c)


def test_what_cannot_be_traced_is_a_capture_error_with_its_cause() -> None:
    with pytest.raises(
        CaptureError, match=r"own code \(outside its blocks.*cannot be traced: RuntimeError: .*Move"
    ) as caught:
        cached_of(UntraceableDiT)(**toy_inputs(1.0))
    assert type(caught.value.__cause__) is RuntimeError


def test_an_error_of_the_model_is_the_models_own() -> None:
    cached, inputs = cached_of(ToyDiT), toy_inputs(1.0)
    inputs["x"] = inputs["x"][..., :-1]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        cached(**inputs)


class PickyDiT(ToyDiT):
    """Looks up positions, which the caller gives as floats."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, DIM)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, places: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x + self.table(places.long()), timestep, text)


def test_inputs_made_up_for_the_check_may_be_illegal() -> None:
    """Noise is no position: then the check changes the sample alone."""
    places = torch.tensor([[0.0, 1, 2, 3, 0, 1]])
    model = make(PickyDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0})
    inputs = toy_inputs(1.0) | {"places": places}
    assert torch.equal(cached(**inputs), model(**inputs))
    with pytest.raises(IndexError):
        cached(**toy_inputs(1.0, size=1), places=torch.full((1, 8), 9.0))


# --- exported: sizes of masked selections --------------------------------------------------------


def masked(step: int, selected: int) -> dict[str, Any]:
    mask = (torch.arange(4) < selected).long()[None]
    return toy_inputs(1000.0 - step, seed=step) | {"mask": mask}


def test_an_exported_program_takes_every_mask_length_that_was_checked() -> None:
    model = make(MaskedDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0})
    for selected in (4, 2):
        cached(**masked(0, selected))
    program = dit_cache_fx.export(cached, (), masked(0, 4))
    for selected in (4, 2):
        run = program.runner()
        assert torch.allclose(run(**masked(0, selected)), model(**masked(0, selected)), atol=1e-6)
        assert not torch.allclose(run(**masked(1, selected)), model(**masked(1, selected)))
    with pytest.raises(RuntimeError, match=r"for other data: its masks selected \[\[2\], \[4\]\]"):
        program.runner()(**masked(0, 3))
