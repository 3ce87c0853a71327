"""Tiny Diffusion Transformers in plain torch, each made for a test, and DeepCache done by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dit_cache_fx import CachedModel
from tests.zoo.case import Case, built, flat, rows, thousand

DIM = 8
TOKENS = 6
TEXT = 4
DEPTH = 3
#: computed steps of a generation of six
STEPS_OF_SIX = frozenset({0, 2, 3})


# --- the parts ---------------------------------------------------------------------------------


class Block(nn.Module):
    """An adaptive norm, a mix over tokens and a mix over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(DIM, DIM)
        self.mix = nn.Linear(DIM, DIM)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        scaled = h * (1 + self.modulation(c)[:, None])
        return h + torch.tanh(self.mix(scaled) + scaled.mean(dim=1, keepdim=True))


class TimeEmbedding(nn.Module):
    """A composite module around the blocks: one vector for each value."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.01
        self.linear = nn.Linear(2, DIM)

    def forward(self, t: Tensor) -> Tensor:
        angle = t.to(self.linear.weight.dtype) * self.scale
        return self.linear(torch.stack([angle.cos(), angle.sin()], dim=-1))


class ToyDiT(nn.Module):
    """`head(blocks(embed(x)))`, conditioned on the time and the mean of the text."""

    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__()
        self.embed = nn.Linear(DIM, DIM)
        self.time = TimeEmbedding()
        self.text_in = nn.Linear(DIM, DIM)
        self.blocks = nn.ModuleList([self.block() for _ in range(depth)])
        self.head = self.last()
        self.gain = 1.0

    def block(self) -> nn.Module:
        return Block()

    def last(self) -> nn.Module:
        return nn.Linear(DIM, DIM)

    def condition(self, timestep: Tensor, text: Tensor) -> Tensor:
        return self.time(timestep) + self.text_in(text).mean(dim=1)

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h, c)
        return h

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        c = self.condition(timestep, text)
        return self.gain * self.head(self.trunk(self.embed(x), c))


def make(kind: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """A model of this kind in evaluation mode, each weight drawn so that it matters."""
    return built(partial(kind, **options))


def new(kind: Callable[..., nn.Module], *args: Any, seed: int = 5) -> nn.Module:
    """A module in evaluation mode with weights drawn by `seed`."""
    return built(lambda: kind(*args), seed)


def toy_inputs(
    timestep: float,
    *,
    seed: int = 0,
    prompt: int = 0,
    size: int = 0,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Keyword arguments of `ToyDiT.forward`; another `size` has more tokens."""
    return {
        "x": rows("toy x", seed, (TOKENS + 2 * size, DIM), batch, dtype),
        "timestep": torch.full([batch], timestep),
        "text": rows("toy text", prompt, (TEXT, DIM), batch, dtype),
    }


#: the plain toy, offered as the zoo offers its models
TOY = Case("ToyDiT", partial(make, ToyDiT), toy_inputs, thousand, ("blocks",), "timestep")


# --- toys for the blocks' own ways ---------------------------------------------------------------


class UnchangedBlock(Block):
    """Returns its input, the same object."""

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return h


class InPlaceBlock(Block):
    """Changes its input in place and returns it."""

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return h.add_(torch.tanh(self.mix(h) + self.modulation(c)[:, None]))


class UnchangedDiT(ToyDiT):
    def block(self) -> nn.Module:
        return UnchangedBlock()


class BareUnchangedDiT(UnchangedDiT):
    """The sample itself goes through blocks that return it: nothing makes another tensor."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return self.head(self.trunk(x, self.condition(timestep, text)))


class InPlaceDiT(ToyDiT):
    def block(self) -> nn.Module:
        return InPlaceBlock()


class InPlaceReadDiT(InPlaceDiT):
    """Reads, after the blocks, what they have changed in place."""

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        return super().trunk(h, c) + h


class InPlaceLayersDiT(ToyDiT):
    """Layers on both sides of the blocks that change their input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.SiLU(inplace=True)
        self.after = nn.SiLU(inplace=True)

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        return self.after(super().trunk(self.before(h), c))


class InPlaceCodeDiT(ToyDiT):
    """In-place arithmetic of the model's own on both sides of the blocks."""

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        h.mul_(0.5)
        h = super().trunk(h, c)
        h[:, 0] += 1
        return h.mul_(2)


class NoHeadDiT(ToyDiT):
    """Returns the last block's result: as it is, or through a layer that passes it on."""

    def __init__(self, last: type[nn.Module] | None = None) -> None:
        self._last = last
        super().__init__()
        self.gain = None  # type: ignore[assignment]

    def last(self) -> nn.Module:
        return nn.Identity() if self._last is None else self._last()

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        h = self.trunk(self.embed(x), self.condition(timestep, text))
        return h if self._last is None else self.head(h)


class JoinedBlock(Block):
    """Image and text as views of one joined tensor."""

    def forward(self, h: Tensor, txt: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        joined = super().forward(torch.cat([h, txt], dim=1), c)
        return joined[:, : h.shape[1]], joined[:, h.shape[1] :]


class JoinedDiT(ToyDiT):
    def block(self) -> nn.Module:
        return JoinedBlock()

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        c, h, txt = self.condition(timestep, text), self.embed(x), self.text_in(text)
        for block in self.blocks:
            h, txt = block(h, txt, c)
        return self.head(h)


class UShapeDiT(ToyDiT):
    """The first half's results are added to the inputs of the second half."""

    def __init__(self) -> None:
        super().__init__(depth=5)

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        first, middle, last = self.blocks[:2], self.blocks[2], self.blocks[3:]
        skips = []
        for block in first:
            h = block(h, c)
            skips.append(h)
        h = middle(h, c)
        for block in last:
            h = block(h + skips.pop(), c)
        return h


class CalledTwiceDiT(ToyDiT):
    """The block in the middle runs twice in a row, the first one again at the end."""

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        for index in (0, 1, 1, 2, 0):
            h = self.blocks[index](h, c)
        return h


class ResidualsDiT(ToyDiT):
    """Adds what a ControlNet gives after each block."""

    def forward(  # type: ignore[override]
        self, x: Tensor, timestep: Tensor, text: Tensor, residuals: Sequence[Tensor] | None = None
    ) -> Any:
        c, h = self.condition(timestep, text), self.embed(x)
        for index, block in enumerate(self.blocks):
            h = block(h, c)
            if residuals is not None:
                h = h + residuals[index]
        return self.head(h)


class StatefulDiT(ToyDiT):
    """Its own code reads a parameter, a buffer and options in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(TOKENS, DIM))
        self.register_buffer("phases", torch.linspace(0, 1, DIM))
        self.factors = [1.0, 0.5]
        self.options = {"bias": 0.25}

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        h = self.factors[0] * (h + self.position) + self.options["bias"]
        return super().trunk(h, c * self.factors[1] + self.phases)


# --- toys for the call's form -----------------------------------------------------------------


class AnyTimeDiT(ToyDiT):
    """Takes the timestep as a number, or as a tensor of any number of dimensions."""

    def forward(self, x: Tensor, timestep: Any, text: Tensor) -> Any:
        if not isinstance(timestep, Tensor):
            timestep = torch.tensor([timestep], device=x.device)
        if timestep.ndim == 0:
            timestep = timestep[None]
        return super().forward(x, timestep.expand(x.shape[0]), text)


class PerTokenBlock(Block):
    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return h + torch.tanh(self.mix(h) * (1 + self.modulation(c)))


class PerTokenDiT(ToyDiT):
    """Takes a timestep for each token, as image-to-video models with a clean first frame do."""

    def block(self) -> nn.Module:
        return PerTokenBlock()

    def condition(self, timestep: Tensor, text: Tensor) -> Tensor:
        return self.time(timestep) + self.text_in(text).mean(dim=1, keepdim=True)


class ReferenceDiT(ToyDiT):
    """Takes a second picture beside the sample."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, reference: Tensor) -> Any:  # type: ignore[override]
        c = self.condition(timestep, text) + reference.mean(dim=1)
        return self.head(self.trunk(self.embed(x) - 0.5 * reference, c))


class NestedDiT(ToyDiT):
    """Takes its conditioning in nested containers."""

    def forward(self, x: Tensor, timestep: Tensor, conditions: dict[str, Any]) -> Any:  # type: ignore[override]
        texts, (gain, bias) = conditions["texts"], conditions["affine"]
        c = sum((self.condition(timestep, text) for text in texts), start=bias)
        return gain * self.head(self.trunk(self.embed(x), c))


class OptionsDiT(ToyDiT):
    """Takes None, numbers, flags and strings beside its tensors."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        timestep: Tensor,
        text: Tensor | None = None,
        *,
        scale: float = 1.0,
        mode: str = "plus",
        flip: bool = False,
    ) -> Any:
        c = self.time(timestep)
        if text is not None:
            c = c + self.text_in(text).mean(dim=1)
        h = self.trunk(self.embed(x), c if mode == "plus" else -c)
        return scale * self.head(h.flip(1) if flip else h)


@dataclass
class ToyOutput:
    """What `OutputsDiT` returns as a dataclass."""

    sample: Tensor
    name: str = "toy"


class OutputsDiT(ToyDiT):
    """Returns its result in the container that it is asked for."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, kind: str = "tensor") -> Any:  # type: ignore[override]
        out = super().forward(x, timestep, text)
        results: dict[str, Callable[[], Any]] = {
            "tensor": lambda: out,
            "tuple": lambda: (out, None, 3),
            "list": lambda: [out, out * 2],
            "dict": lambda: {"sample": out, "more": {"half": out / 2}},
            "dataclass": lambda: ToyOutput(out),
        }
        return results[kind]()


class ContextDiT(ToyDiT):
    """Has a `cache_context` of its own, as every diffusers model has."""

    def __init__(self) -> None:
        super().__init__()
        self.contexts: list[str] = []

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        self.contexts.append(name)
        yield
        self.contexts.pop()


# --- toys for what a capture must see -------------------------------------------------------------


class ReadingDiT(ToyDiT):
    """Its own code asks `question` about the text, outside of any block."""

    def __init__(self, question: Callable[[Tensor], float]) -> None:
        super().__init__()
        self.question = question

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        return super().forward(x, timestep, text) * self.question(text)


class ReadsTimeDiT(ToyDiT):
    """Reads the timestep into a Python number."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        return super().forward(x * (1 + timestep[0].item() / 1000), timestep, text)


class MaskedDiT(ToyDiT):
    """Uses only the rows of the text that the mask selects."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, timestep, text[mask.bool()][None])


class RandomDiT(ToyDiT):
    """Adds noise of its own, outside of any block."""

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        return super().trunk(h + 0.1 * torch.randn_like(h), c)


class CountingDiT(ToyDiT):
    """Its result depends on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = [0]

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        self.seen[0] += 1
        return super().trunk(h * self.seen[0], c)


class DecidesOnBlockDiT(ToyDiT):
    """Its control flow depends on what a block returned."""

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h, c)
            if h.sum() > 1e9:
                break
        return h


# --- toys for the search of blocks and timestep ---------------------------------------------------


class Layer(nn.Module):
    """A composite module of one input, such as an attention or a feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.mix = nn.Linear(DIM, DIM)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.mix(self.norm(h)))


def layers(count: int) -> nn.ModuleList:
    return nn.ModuleList([Layer() for _ in range(count)])


class TextRefinerDiT(ToyDiT):
    """The text goes through blocks of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.refiner = layers(2)

    def condition(self, timestep: Tensor, text: Tensor) -> Tensor:
        for layer in self.refiner:
            text = layer(text)
        return super().condition(timestep, text)


class SampleRefinerDiT(ToyDiT):
    """The sample goes through blocks of its own before it meets the text."""

    def __init__(self) -> None:
        super().__init__()
        self.refiner = layers(2)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        for layer in self.refiner:
            x = layer(x)
        return super().forward(x, timestep, text)


class LayerListDiT(ToyDiT):
    """A list of plain layers beside the blocks: one is added after each block."""

    def __init__(self) -> None:
        super().__init__()
        self.adds = nn.ModuleList([nn.Linear(DIM, DIM) for _ in range(DEPTH)])

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        for block, add in zip(self.blocks, self.adds, strict=True):
            h = block(h, c) + add(h)
        return h


class UnusedListDiT(ToyDiT):
    """Holds a list that forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = layers(9)


class PairsDiT(ToyDiT):
    """Each member of its list is a list: `[attention, feed-forward]`."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([layers(2) for _ in range(DEPTH)])

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        h = h + c[:, None]
        for attention, feed_forward in self.blocks:  # type: ignore[misc]
            h = feed_forward(attention(h))
        return h


class NestedBlocksDiT(ToyDiT):
    """Its list is inside another module."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk_module = nn.Module()
        self.trunk_module.layers = self.blocks
        del self.blocks

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        for block in self.trunk_module.layers:  # type: ignore[union-attr]
            h = block(h, c)
        return h


class PlainLayersDiT(ToyDiT):
    """No list of it could be a trunk."""

    def __init__(self) -> None:
        super().__init__()
        del self.blocks
        self.layers = nn.ModuleList([nn.Linear(DIM, DIM) for _ in range(DEPTH)])
        self.text_layers = layers(2)
        self.spare = layers(2)

    def condition(self, timestep: Tensor, text: Tensor) -> Tensor:
        for layer in self.text_layers:
            text = layer(text)
        return super().condition(timestep, text)

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        h = h + c[:, None]
        for layer in self.layers:
            h = torch.tanh(layer(h))
        return h


class SequentialDiT(ToyDiT):
    """Its trunk is an `nn.Sequential`."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*layers(DEPTH))  # type: ignore[assignment]

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        return self.blocks(h + c[:, None])


class TauDiT(ToyDiT):
    """The timestep has another name."""

    def forward(self, x: Tensor, tau: Tensor, text: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, tau, text)


class TwoTausDiT(ToyDiT):
    """Two arguments could be the timestep."""

    def forward(self, x: Tensor, tau: Tensor, rho: Tensor, text: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x * (1 + rho[:, None, None]), tau, text)


# --- what tests do with a model ---------------------------------------------------------------


class ByHand:
    """DeepCache by hand: a copy of the model whose blocks can return what they returned before.

    `by_hand(True, **inputs)` runs the blocks and keeps their results for `branch`,
    `by_hand(False, **inputs)` has them return those. The blocks in `never` always run.
    """

    def __init__(self, model: nn.Module, lists: Sequence[str], never: Sequence[str] = ()) -> None:
        self.model = copy.deepcopy(model)
        self._kept: dict[Any, list[Any]] = {}
        self._made: list[Any] = []
        self._replay: Iterator[Any] | None = None
        for name in lists:
            for index, block in enumerate(self.model.get_submodule(name).children()):
                if f"{name}.{index}" in never:
                    continue
                block.forward = partial(self._block, block.forward)  # type: ignore[method-assign]

    def __call__(self, computes: bool, *, branch: Any = 0, **inputs: Any) -> Any:
        self._made = []
        self._replay = None if computes else iter(self._kept[branch])
        with torch.no_grad():
            output = self.model(**inputs)
        if computes:
            self._kept[branch] = self._made
        return output

    def _block(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._replay is not None:
            return _clones(next(self._replay))
        output = forward(*args, **kwargs)
        self._made.append(_clones(output))
        return output


def _clones(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, value)


def follows(
    cached: Callable[..., Any], by_hand: ByHand, calls: Sequence[tuple[bool, dict[str, Any]]]
) -> None:
    """Assert that every call of the cached model gives, bit by bit, what is done by hand."""
    for index, (computes, inputs) in enumerate(calls):
        want = flat(by_hand(computes, **_clones(inputs)))
        assert torch.equal(flat(cached(**inputs)), want), f"call {index}, computes={computes}"


def generation(
    case: Case, computed: Collection[int], *, steps: int = 6, **options: Any
) -> list[tuple[bool, dict[str, Any]]]:
    """The calls of one generation: another sample at each step, the same conditioning."""
    return [
        (index in computed, case.inputs(timestep, seed=index, **options))
        for index, timestep in enumerate(case.timesteps(steps))
    ]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within it tensors are made of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def runs_of(modules: Sequence[nn.Module] | nn.ModuleList) -> Iterator[list[int]]:
    """A list of how often each of the modules ran within the context."""
    counts = [0] * len(modules)

    def count(index: int, *_: Any) -> None:
        counts[index] += 1

    hooks = [m.register_forward_pre_hook(partial(count, i)) for i, m in enumerate(modules)]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def blocks_of(model: nn.Module, case: Case) -> list[nn.Module]:
    """The trunk blocks of a case's model, in call order."""
    return [block for name in case.block_lists for block in model.get_submodule(name).children()]


def actions(cached: CachedModel) -> str:
    """What the calls of the last generation did: "C" for computed, "r" for any other."""
    timeline = cached.cache_report().timeline
    return "".join("C" if record.action == "computed" else "r" for record in timeline)
