"""The timestep's four forms: forward's argument, the graph's input, its position, its value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dit_cache_fx
from tests.toys import DIM, ToyDiT, make


class Nested(ToyDiT):
    """Is given its timestep inside of a dict, behind the text."""

    def forward(self, x: Tensor, more: dict[str, Tensor], text: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, more["when"], text)


def test_a_capture_tells_argument_input_and_position() -> None:
    cached = dit_cache_fx.apply(make(Nested), "deepcache", timestep="more", no_cache_steps={0})
    text = torch.randn(1, 3, DIM)
    for number in (900.0, 800.0):
        with torch.no_grad():
            cached(torch.randn(1, 4, DIM), more={"when": torch.tensor([number])}, text=text)
    (entry,) = cached._engine.graphs.all()
    program = entry.program
    assert program.timestep_argument == "more"
    assert program.timestep_input == "more_when"
    assert program.timestep_position == 1
    assert [record.timestep for record in cached.cache_report().timeline] == [900.0, 800.0]
    assert cached.explain().graphs[0].timestep == "argument 'more'"


def test_an_argument_of_no_usual_name_is_learnt_from_the_capture() -> None:
    class Renamed(ToyDiT):
        def forward(self, x: Tensor, when: Tensor, text: Tensor) -> Any:  # type: ignore[override]
            return super().forward(x, when, text)

    cached = dit_cache_fx.apply(make(Renamed), "deepcache", no_cache_steps={0})
    graphs = cached._engine.graphs
    assert graphs.timestep_argument is None
    with torch.no_grad():
        cached(torch.randn(1, 4, DIM), torch.tensor([900.0]), torch.randn(1, 3, DIM))
    assert graphs.timestep_argument == "when"
    assert graphs.all()[0].program.timestep_argument == "when"
