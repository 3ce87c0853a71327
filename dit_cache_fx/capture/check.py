"""Check a captured graph against the model before using it.

Both run on inputs that the capture has not seen, with every block replaced by a stand-in, so the
check costs only the model's own code around its blocks. Each block must be called with the same
values, and the outputs must be bitwise equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from dit_cache_fx._torch import without_mode
from dit_cache_fx.capture.ambient import Ambient
from dit_cache_fx.capture.intercept import intercepted
from dit_cache_fx.capture.recording import RecordedCall, Recording
from dit_cache_fx.capture.samples import Samples, other_block
from dit_cache_fx.capture.scalar_timestep import NumberFactories
from dit_cache_fx.errors import CaptureError, DitCacheError
from dit_cache_fx.values.checksum import checksum
from dit_cache_fx.values.identity import alike
from dit_cache_fx.values.pytree import Skeleton, constants, flatten, unflatten
from dit_cache_fx.values.wrapped import Layout, laid_out, own_part


class _Checksum(NamedTuple):
    """A checksum that separates tensors without keeping them."""

    kind: str
    first: int
    second: int


class _Place(NamedTuple):
    """The position of a tensor in a run: block call (None: the output) and index."""

    call: int | None
    number: int


@dataclass
class _Run:
    """The block calls of a run, and checksums of their tensors."""

    calls: list[str] = field(default_factory=list)
    states: list[Ambient] = field(default_factory=list)  # torch's state at each call
    constants: list[list[Any]] = field(default_factory=list)  # non-tensor arguments
    checksums: dict[_Place, _Checksum] = field(default_factory=dict)
    samples: Samples = field(default_factory=Samples)
    wanted: _Place | None = None
    tensor: torch.Tensor | None = None

    def show(self, call: int | None, tensors: Sequence[torch.Tensor]) -> None:
        for index, tensor in enumerate(tensors):
            place = _Place(call, index)
            self.checksums[place] = _checksum(tensor)
            if place == self.wanted:
                self.tensor = tensor


def compare(
    model: Callable[[], Any],
    graph: Callable[[], Any],
    blocks: Mapping[nn.Module, str],
    recording: Recording,
    sampled: bool = False,
) -> str | None:
    """Return the first difference between the model's run and the graph's; None if there is none.

    `sampled`: also run the first block of each list.
    """
    want = _run(model, blocks, recording, _Run(samples=Samples(sampled)))
    got = _run(graph, blocks, recording, _Run(samples=Samples(sampled)))
    if want.calls != got.calls:
        return f"it calls blocks {got.calls}, the model calls {want.calls}"
    for name, *each in zip(want.calls, want.constants, got.constants, strict=True):
        unlike = _first_unlike(*each)
        if unlike is not None:
            return f"it calls block {name} with {unlike}"
    for name, model_state, state in zip(want.calls, want.states, got.states, strict=True):
        if state != model_state:
            return (
                f"it calls block {name} with torch in the state {state}, the model with "
                f"{model_state}"
            )
    if sampled:
        _compare_samples(
            want, got, lambda: _run(graph, blocks, recording, _Run(samples=Samples(True)))
        )
    place = next((p for p in want.checksums if want.checksums[p] != got.checksums.get(p)), None)
    if place is None:
        return None if len(want.checksums) == len(got.checksums) else "it passes more tensors"
    a = _run(model, blocks, recording, _Run(wanted=place)).tensor
    b = _run(graph, blocks, recording, _Run(wanted=place)).tensor
    where = "output" if place.call is None else f"input of block {want.calls[place.call]}"
    return f"{where}, tensor {place.number}: {_difference(a, b)}"


def _compare_samples(want: _Run, got: _Run, again: Callable[[], _Run]) -> None:
    """Refuse blocks that differ in the graph; blocks that always differ are no evidence."""
    name = want.samples.unlike(got.samples)
    if name is not None and again().samples.unlike(got.samples) is None:
        raise other_block(name)


def refuse(difference: str) -> CaptureError:
    """Return the error for a capture that differs."""
    return CaptureError(
        f"the captured graph disagrees with the model: {difference}. Something in the model's "
        "forward (outside its blocks) depends on more than its tensors and arguments, or on "
        "randomness. Move it into a block or a layer; or pass check=False if the difference is "
        "acceptable"
    )


class IllegalInputs(Exception):
    """The model refuses generated inputs; the cause says why."""


def refusable(model: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function that runs the model on generated inputs; errors become `IllegalInputs`."""

    def run() -> Any:
        try:
            return model()
        except DitCacheError:
            raise
        except Exception as error:
            raise IllegalInputs from error

    return run


def second_inputs(
    tensors: Sequence[torch.Tensor], timestep_position: int, sample: Sequence[int]
) -> Iterator[list[torch.Tensor]]:
    """Yield inputs that differ from the capture's: first all, then those that change each step.

    Integers and booleans (ids, labels, masks) keep their values, except the timestep: another value
    might be invalid.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    for only in (range(len(tensors)), sample):
        changed = [t.clone() for t in tensors]
        for i in only:
            if tensors[i].is_floating_point():
                noise = torch.randn(tensors[i].shape, generator=generator, device="cpu")
                noise = noise.to(tensors[i].device, tensors[i].dtype)
                changed[i] = laid_out(noise, Layout.of(tensors[i]))
        changed[timestep_position] = _another_timestep(tensors[timestep_position])
        yield changed


def _another_timestep(value: torch.Tensor) -> torch.Tensor:
    return value // 2 + 1 if not value.is_floating_point() else value * 0.5 + 0.25


def _run(
    run: Callable[[], Any], blocks: Mapping[nn.Module, str], recording: Recording, shown: _Run
) -> _Run:
    names = set(blocks.values())
    calls = iter([c for c in recording.calls if c.name in names])

    def handle(
        module: nn.Module, name: str, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        inputs, skeleton = flatten((args, kwargs))
        shown.states.append(Ambient.now())
        shown.constants.append(list(constants(skeleton)))
        shown.show(len(shown.calls), inputs)
        shown.samples.take(name, lambda given: _called(call, module, skeleton, given), inputs)
        shown.calls.append(name)
        made = next(calls, None)
        if made is None or made.name != name:
            raise CaptureError(f"block {name} was called in another order than at capture")
        return unflatten(made.skeleton, stand_in(made, len(shown.calls), inputs))

    with intercepted(blocks, handle):
        output = run()
    shown.show(None, flatten(output)[0])
    return shown


def _called(
    call: Callable[..., Any], module: nn.Module, skeleton: Skeleton, inputs: Sequence[torch.Tensor]
) -> Any:
    args, kwargs = unflatten(skeleton, list(inputs))
    with without_mode(NumberFactories):
        return call(module, *args, **kwargs)


def stand_in(made: RecordedCall, index: int, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return replacements for a block's outputs: unique to the block, equal in each run."""
    outputs = []
    for place, spec in enumerate(made.specs):
        like = made.like[place]
        shape = spec.shape if like is None else inputs[like].shape
        generator = torch.Generator(spec.device).manual_seed(1000 * index + place)
        noise = torch.rand(shape, generator=generator, device=spec.device)
        outputs.append(laid_out(noise.to(spec.dtype), made.layouts[place]))
    return outputs


def _checksum(tensor: torch.Tensor) -> _Checksum:
    first, second = checksum(tensor).tolist()
    return _Checksum(_kind(tensor), first, second)


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype}{list(tensor.shape)} on {tensor.device}"


def _first_unlike(want: Sequence[Any], got: Sequence[Any]) -> str | None:
    if len(want) != len(got):
        return f"{len(got)} values that are no tensors, the model's with {len(want)}"
    for a, b in zip(want, got, strict=True):
        if not alike(a, b):
            return f"{_short(b)}, the model's with {_short(a)}"
    return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _difference(want: torch.Tensor | None, got: torch.Tensor | None) -> str:
    if want is None or got is None:
        return "missing" if got is None else "too many"
    if want.shape != got.shape or want.dtype != got.dtype or want.device != got.device:
        return f"{_kind(got)} instead of {_kind(want)}"
    want, got = own_part(want), own_part(got)
    differs = ~((want == got) | ((want != want) & (got != got)))
    if not bool(differs.any()):
        return "equal values of other bits (-0.0 or NaN)"
    at = tuple(differs.nonzero()[0].tolist())
    return f"{got[at].item()} instead of {want[at].item()} at {at} of {_kind(want)}"
