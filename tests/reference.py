"""What each strategy has to do, written as plainly as possible: wrapped block forwards.

A reference works on its own copy of the model and is told which step it is at. Between two blocks
that are skipped the stored values pass through and mean nothing: nobody reads them.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.zoo import Case

BlockKey = tuple[str, int]
Ids = Mapping[str, Collection[int]]


@dataclass(frozen=True)
class Stream:
    """How the blocks of one list take and give the stream that TeaCache tracks."""

    argument: str
    result: int | None = None  # its place in what a block returns; None: that is the stream itself


HIDDEN = "hidden_states"
STREAMS: dict[str, dict[str, Stream]] = {
    "FluxTransformer2DModel": {
        "transformer_blocks": Stream(HIDDEN, 1),
        "single_transformer_blocks": Stream(HIDDEN, 1),
    },
    "SD3Transformer2DModel": {"transformer_blocks": Stream(HIDDEN, 1)},
    "DiTTransformer2DModel": {"transformer_blocks": Stream(HIDDEN)},
    "PixArtTransformer2DModel": {"transformer_blocks": Stream(HIDDEN)},
    "QwenImageTransformer2DModel": {"transformer_blocks": Stream(HIDDEN, 1)},
    "HunyuanVideoTransformer3DModel": {
        "transformer_blocks": Stream(HIDDEN, 0),
        "single_transformer_blocks": Stream(HIDDEN, 0),
    },
    "HunyuanVideo15Transformer3DModel": {"transformer_blocks": Stream(HIDDEN, 0)},
    "WanTransformer3DModel": {"blocks": Stream(HIDDEN)},
    "CogVideoXTransformer3DModel": {"transformer_blocks": Stream(HIDDEN, 0)},
    "LTXVideoTransformer3DModel": {"transformer_blocks": Stream(HIDDEN)},
    "ZImageTransformer2DModel": {"layers": Stream("x")},
    "OfficialHunyuanVideo15": {"double_blocks": Stream("img", 0)},
    "OfficialHunyuanVideo15Single": {
        "double_blocks": Stream("img", 0),
        "single_blocks": Stream("x"),
    },
}


class Reference:
    """A copy of `model` that skips the blocks of `lists` on the steps not in `computed`.

    Blocks in `no_cache_block_id` (list name -> ids) are left as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        lists: Sequence[str],
        computed: Collection[int],
        no_cache_block_id: Ids | None = None,
    ) -> None:
        self.model = copy.deepcopy(model)
        self.computed = computed
        self.step = 0
        self.runs = runs_of(self.model, lists, no_cache_block_id or {})
        for key in (key for run in self.runs for key in run):
            block = self.block(key)
            block.forward = partial(self.answer, key, block.forward)

    def __call__(self, step: int, inputs: Mapping[str, Any]) -> Any:
        """The model's output at a step."""
        self.step = step
        return self.model(**inputs)

    def block(self, key: BlockKey) -> nn.Module:
        """The block of that list and place."""
        return self.model.get_submodule(key[0])[key[1]]

    @property
    def computes(self) -> bool:
        """Whether the step under way is computed in full."""
        return self.step in self.computed

    def answer(self, key: BlockKey, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the block returns at this step."""
        raise NotImplementedError


def runs_of(model: nn.Module, lists: Sequence[str], ids: Ids) -> list[list[BlockKey]]:
    """The cached blocks in call order, grouped where nothing that always runs is between them."""
    runs: list[list[BlockKey]] = [[]]
    for name in lists:
        for index in range(len(model.get_submodule(name))):
            if index in ids.get(name, ()):
                runs.append([])
            else:
                runs[-1].append((name, index))
    return [run for run in runs if run]


class DeepCacheReference(Reference):
    """Every block's output is stored on computed steps and returned on the others."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stored: dict[BlockKey, Any] = {}

    def answer(self, key: BlockKey, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.computes:
            self.stored[key] = copied(forward(*args, **kwargs))
        return copied(self.stored[key])


class TeaCacheReference(Reference):
    """What a run of blocks adds to the tracked stream is stored, and added to this step's input.

    What else the run's last block returns is as stored. Where a run starts on image rows and ends
    on a joined sequence (image rows first), the residual is over the image rows.
    """

    def __init__(self, streams: Mapping[str, Stream], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.streams = streams
        self.stored: dict[BlockKey, Any] = {}
        self.start: dict[BlockKey, Tensor] = {}  # by the run's last block, as is what follows
        self.residual: dict[BlockKey, Tensor] = {}

    def answer(self, key: BlockKey, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run = next(run for run in self.runs if key in run)
        first, last = run[0], run[-1]
        if key == first:
            name = self.streams[key[0]].argument
            self.start[last] = argument(forward, name, args, kwargs).clone()
        if self.computes:
            self.stored[key] = copied(forward(*args, **kwargs))
        if key != last:
            return copied(self.stored[key])
        return self._end(key)

    def _end(self, key: BlockKey) -> Any:
        output, place = copied(self.stored[key]), self.streams[key[0]].result
        stream = output if place is None else output[place]
        rows = self.start[key].shape[1]
        if self.computes:
            self.residual[key] = stream[:, :rows] - self.start[key]
            return output
        image = self.start[key] + self.residual[key]
        stream = torch.cat([image, stream[:, rows:]], dim=1)
        return stream if place is None else replaced(output, place, stream)


class TaylorReference(Reference):
    """Every output of every block is extrapolated from its values on the computed steps."""

    def __init__(
        self,
        *args: Any,
        max_order: int = 2,
        low_freqs_order: int = 2,
        high_freqs_order: int = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.orders = min(low_freqs_order, max_order), min(high_freqs_order, max_order)
        self.stored: dict[BlockKey, Any] = {}
        self.series: dict[tuple[BlockKey, int], list[TaylorSeries]] = {}
        self.last: dict[BlockKey, int] = {}

    def answer(self, key: BlockKey, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.computes:
            output = forward(*args, **kwargs)
            self._store(key, output)
            return output
        leaves, structure = pytree.tree_flatten(self.stored[key])
        distance = self.step - self.last[key]
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                bands = [band.predicted(distance) for band in self.series[key, place]]
                leaves[place] = sum(bands[1:], start=bands[0])
        return pytree.tree_unflatten(leaves, structure)

    def _store(self, key: BlockKey, output: Any) -> None:
        distance = self.step - self.last.get(key, self.step)
        for place, leaf in enumerate(pytree.tree_leaves(output)):
            if isinstance(leaf, Tensor):
                series = self.series.setdefault((key, place), self._series())
                bands = split(leaf) if len(series) == 2 else [leaf]
                for band, of_band in zip(bands, series, strict=True):
                    of_band.add(band, distance)
        self.stored[key], self.last[key] = copied(output), self.step

    def _series(self) -> list[TaylorSeries]:
        """One for each band; bands of one order are not told apart."""
        low, high = self.orders
        return [TaylorSeries(low)] if low == high else [TaylorSeries(low), TaylorSeries(high)]


class TaylorSeries:
    """`D[0] = x`, `D[i + 1] = (D[i] - D_old[i]) / distance`, as far as there are old values."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.derivatives: list[Tensor] = []

    def add(self, value: Tensor, distance: int) -> None:
        """The value at a computed step, `distance` steps after the one before it."""
        new = [value.clone()]
        for old in self.derivatives[: self.order]:
            new.append((new[-1] - old) / distance)
        self.derivatives = new

    def predicted(self, distance: int) -> Tensor:
        """The value `distance` steps after the last computed step."""
        terms = [d * (distance**i / math.factorial(i)) for i, d in enumerate(self.derivatives)]
        return torch.stack(terms).sum(dim=0)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high frequencies of the tokens (dimension 1)."""
    frequencies = torch.fft.fftfreq(x.shape[1]).abs()
    low = (frequencies <= 0.1 * frequencies.max()).reshape(1, -1, *[1] * (x.ndim - 2))
    spectrum = torch.fft.fft(x, dim=1)
    return (
        torch.fft.ifft(spectrum.where(low, 0), dim=1).real,
        torch.fft.ifft(spectrum.where(~low, 0), dim=1).real,
    )


def dynamic_steps(
    signals: Sequence[Tensor],
    threshold: float,
    coefficients: Sequence[float] = (1.0, 0.0),
    forced: Collection[int] = (),
) -> list[int]:
    """The steps that TeaCache's published rule computes; `signals`: of every step, in order.

    Refuses a case where rounding could decide.
    """
    computed, total = [0], 0.0
    for step in range(1, len(signals)):
        old, new = signals[step - 1].double(), signals[step].double()
        change = ((new - old).abs().mean() / old.abs().mean()).item()
        degree = len(coefficients) - 1
        total += sum(c * change ** (degree - i) for i, c in enumerate(coefficients))
        assert abs(total - threshold) > 1e-4 * threshold, "too close to tell: choose another case"
        if step in forced or total >= threshold:
            computed.append(step)
            total = 0.0
    return computed


def argument(forward: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Any:
    """The value that a call passes for the parameter `name`."""
    return inspect.signature(forward).bind(*args, **kwargs).arguments[name]


def copied(value: Any) -> Any:
    """The same nested value with tensors of its own."""
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)


def replaced(values: Sequence[Any], place: int, value: Any) -> tuple[Any, ...]:
    """`values` with another one at `place`."""
    return (*values[:place], value, *values[place + 1 :])


def moving_inputs(model_case: Case, step: int, steps: int, **kwargs: Any) -> dict[str, Any]:
    """The inputs of a step of a generation: the sample moves evenly from one draw to another."""
    timestep = model_case.timesteps(steps)[step]
    first = model_case.inputs(timestep, seed=0, **kwargs)
    last = model_case.inputs(timestep, seed=1, **kwargs)
    share = step / steps
    return pytree.tree_map(lambda a, b: between(a, b, share), first, last)


def between(first: Any, last: Any, share: float) -> Any:
    """A tensor on its way from one draw to another; what both draws share stays as it is."""
    if not isinstance(first, Tensor) or torch.equal(first, last):
        return first
    return first * (1 - share) + last * share
