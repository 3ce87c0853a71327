"""Containers of any type as arguments of the model and of its blocks: right, or refused."""

from __future__ import annotations

from collections import ChainMap, Counter, OrderedDict, UserDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_cache_fx
from dit_cache_fx import CaptureError
from dit_cache_fx.values.pytree import flatten, unflatten
from tests.toys import DIM, TOY, Block, ToyDiT, actions, generation, make

STEPS = {0, 2, 3}


class Own(Mapping[str, Any]):
    """A mapping of the user's own."""

    def __init__(self, **items: Any) -> None:
        self.items_ = items

    def __getitem__(self, key: str) -> Any:
        return self.items_[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)


class Asking(dict[str, Any]):
    """Made in another way than other dicts."""

    def __init__(self, c: Tensor) -> None:
        super().__init__()
        self["c"] = c
        self.gain = 2.0


class Defaults(OrderedDict[str, Any]):
    def __init__(self, c: Tensor) -> None:
        super().__init__(c=c)


class Rows(list[Tensor]):
    """A list that is made of its parts, with an attribute."""

    def __init__(self, *parts: Tensor, gain: float = 2.0) -> None:
        super().__init__(parts)
        self.gain = gain

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(0 if key == "c" else key)


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "defaultdict": lambda c: defaultdict(lambda: None, c=c),
    "defaultdict of lists": lambda c: defaultdict(list, c=c),
    "OrderedDict": lambda c: OrderedDict(c=c),
    "ChainMap": lambda c: ChainMap({"c": c}, {"d": c + 1}),
    "MappingProxyType": lambda c: MappingProxyType({"c": c}),
    "UserDict": lambda c: UserDict({"c": c}),
    "Counter": lambda c: Counter({"c": c}),
    "Mapping": lambda c: Own(c=c),
    "dict with an __init__": Asking,
    "OrderedDict with an __init__": Defaults,
    "list with an __init__": Rows,
}


pytestmark = pytest.mark.usefixtures("no_grad")


def right(model: nn.Module, calls: list[tuple[bool, dict[str, Any]]]) -> None:
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
    for computes, inputs in calls:
        assert torch.equal(cached(**inputs), model(**inputs)) == computes
    assert actions(cached) == "CrCCrr"
    assert len(cached.cache_report().captures) == 1


class TakesDiT(ToyDiT):
    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, given: Any) -> Any:  # type: ignore[override]
        assert type(given) is self.__dict__["kind"]
        gain = getattr(given, "gain", 1.0)
        return super().forward(x, timestep, text + gain * given["c"])


class GivesBlock(Block):
    def forward(self, h: Tensor, c: Any) -> Tensor:
        return super().forward(h, getattr(c, "gain", 1.0) * c["c"])


class GivesDiT(ToyDiT):
    def __init__(self, given: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.__dict__["given"] = given

    def block(self) -> nn.Module:
        return GivesBlock()

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        return super().trunk(h, self.__dict__["given"](c))


@pytest.mark.parametrize("kind", KINDS)
def test_as_an_argument_of_the_model(kind: str) -> None:
    model = make(TakesDiT)
    model.__dict__["kind"] = type(KINDS[kind](torch.ones(1)))
    fixed = torch.full((1, 1, DIM), 0.5)
    calls = generation(TOY, STEPS)
    right(model, [(c, inputs | {"given": KINDS[kind](fixed)}) for c, inputs in calls])


@pytest.mark.parametrize("kind", KINDS)
def test_as_an_argument_of_the_blocks(kind: str) -> None:
    right(make(GivesDiT, given=KINDS[kind]), generation(TOY, STEPS))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rebuilt_one_is_like_it(kind: str) -> None:
    given = KINDS[kind](torch.arange(3.0))
    tensors, skeleton = flatten(given)
    again = unflatten(skeleton, tensors)
    assert type(again) is type(given)
    assert again["c"] is given["c"]
    assert flatten(again)[1] == skeleton
    if isinstance(given, defaultdict):
        assert again.default_factory is given.default_factory


class Scale:
    """An object whose method counts how often it is asked."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale
        self.uses = 0

    def use(self) -> Tensor:
        self.uses += 1
        return self.scale


class CountsDiT(ToyDiT):
    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, given: Any) -> Any:  # type: ignore[override]
        return super().forward(x, timestep, text) * given.use()


class AppendsDiT(ToyDiT):
    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, given: Any) -> Any:  # type: ignore[override]
        given.append(x)
        return super().forward(x, timestep, text)


class SetsDiT(ToyDiT):
    """Notes what it has made of an argument in the argument."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, given: Any) -> Any:  # type: ignore[override]
        given["note"] = x.mean(1) if given["tensor"] else 2 * given["rows"]
        return super().forward(x, timestep, text * given["rows"])


def test_a_note_in_a_dict_may_be() -> None:
    calls = generation(TOY, STEPS)
    right(make(SetsDiT), [(c, i | {"given": {"rows": 3, "tensor": False}}) for c, i in calls])


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (CountsDiT, Scale(torch.tensor(2.0))),
        (AppendsDiT, []),
        (SetsDiT, {"rows": 3, "tensor": True}),
        (SetsDiT, {"rows": 3, "tensor": False, "note": 0}),
    ],
)
def test_an_argument_that_the_model_changes_is_refused(kind: type[nn.Module], given: Any) -> None:
    cached = dit_cache_fx.apply(make(kind), "deepcache", no_cache_steps=STEPS)
    _, inputs = generation(TOY, STEPS)[0]
    with pytest.raises(CaptureError, match="changes its argument 'given'"):
        cached(**inputs, given=given)


def test_functions_made_anew_are_the_same_where_they_close_over_nothing() -> None:
    def made(value: float | None = None) -> Callable[[], Any]:
        return (lambda: 1.0) if value is None else (lambda: value)

    forms = [flatten({"f": made()})[1], flatten({"f": made()})[1]]
    assert forms[0] == forms[1]
    assert hash(forms[0]) == hash(forms[1])
    assert flatten({"f": made(2.0)})[1] != flatten({"f": made(2.0)})[1]
