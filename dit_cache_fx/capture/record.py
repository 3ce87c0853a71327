"""Phase one of a capture: run the model once as it is, and note what each kept module returned.

The blocks run exactly once, outside of any tracer. Tracing (phase two) and the first computed step
then replay what was recorded, so a capture costs no second forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dit_cache_fx._torch import without_mode
from dit_cache_fx.capture.intercept import intercepted
from dit_cache_fx.capture.scalar_timestep import NumberFactories
from dit_cache_fx.values.identity import storage_key, version
from dit_cache_fx.values.pytree import Skeleton, flatten
from dit_cache_fx.values.tensor_spec import TensorSpec


@dataclass
class Inside:
    """What a block did inside: the call that it got, and the calls of its parts."""

    block: nn.Module
    parts: Mapping[nn.Module, str]
    tensors: list[torch.Tensor]
    skeleton: Skeleton
    recording: Recording


@dataclass
class ModuleCall:
    """One call of a kept module."""

    name: str
    specs: list[TensorSpec]
    skeleton: Skeleton
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    mutated: tuple[int, ...] = ()  # which of its tensor arguments it changed in place
    like: tuple[int | None, ...] = ()  # for each output a tensor argument of the same shape
    inside: Inside | None = None
    rewrites: bool = False  # whether it put something else into a container among its arguments
    writes: frozenset[int] = frozenset()  # addresses of memory that it changed and did not return

    def outputs(self) -> list[torch.Tensor]:
        """What it returned, as new tensor objects; placeholders where no value was kept."""
        return [
            self.values[i].detach() if i in self.values else spec.placeholder()
            for i, spec in enumerate(self.specs)
        ]


@dataclass
class Recording:
    """The calls of the kept modules in order, and what the model returned."""

    calls: list[ModuleCall]
    output: Any

    def forget(self) -> None:
        """Let go of the values: only the first answer needs them."""
        self.output = None
        for made in self.calls:
            made.values.clear()


def record(
    run: Callable[[], Any],
    kept: Mapping[nn.Module, str],
    blocks: Collection[nn.Module],
    always_run: Collection[nn.Module] = (),
    opened: Mapping[nn.Module, Mapping[nn.Module, str]] | None = None,
) -> Recording:
    """Run the model and record its kept modules' calls.

    A block's output is held only when something other than a cached block reads it: holding every
    block's output would be what the cache is here to avoid. `always_run` are the blocks that are
    never cached; what they read and give is held too. `opened`: blocks -> their parts, whose calls
    are recorded as well.
    """
    calls: list[ModuleCall] = []
    reader = _Reader()
    parts = opened or {}

    def handle(
        module: nn.Module, name: str, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        inputs, given = flatten((args, kwargs))
        if module not in blocks or module in always_run:
            reader.reads(inputs)
        versions = [version(t) for t in inputs]
        inside: Inside | None = None
        with reader.paused(), without_mode(NumberFactories):
            if module in parts:
                within = record(lambda: call(module, *args, **kwargs), parts[module], ())
                inside = Inside(module, parts[module], inputs, given, within)
                output = within.output
            else:
                output = call(module, *args, **kwargs)
        outputs, skeleton = flatten(output)
        after, kept_form = flatten((args, kwargs))
        rewrites = given != kept_form or any(a is not b for a, b in zip(inputs, after, strict=True))
        mutated = tuple(i for i, t in enumerate(inputs) if version(t) != versions[i])
        returned = {storage_key(t) for t in outputs} if mutated else set()
        writes = {storage_key(inputs[i]) for i in mutated} - returned
        shapes = [t.shape for t in inputs]
        like = tuple(shapes.index(t.shape) if t.shape in shapes else None for t in outputs)
        specs = [TensorSpec.of(t) for t in outputs]
        made = ModuleCall(name, specs, skeleton, mutated=mutated, like=like, inside=inside)
        made.rewrites, made.writes = rewrites, frozenset(writes)
        reader.produced(made, outputs)
        if module in always_run:  # a copy: whoever gets it may change it in place
            made.values.update((i, t.clone()) for i, t in enumerate(outputs))
        elif module not in blocks:
            reader.hold(made, outputs)
        calls.append(made)
        return output

    with intercepted(kept, handle), reader:
        output = run()
        reader.reads(flatten(output)[0])
    return Recording(calls, output)


class _Reader(TorchDispatchMode):
    """Watches which recorded outputs are read by the model's own code."""

    def __init__(self) -> None:
        super().__init__()
        self._origin: dict[int, tuple[ref[torch.Tensor], ModuleCall, int]] = {}
        self._held: dict[int, list[tuple[ModuleCall, int]]] = {}  # by the memory that it shares

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = flatten((args, kwargs or {}))[0]
        self.reads(tensors)
        if isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable:
            self._set_apart(tensors)
        return func(*args, **(kwargs or {}))

    def produced(self, call: ModuleCall, outputs: list[torch.Tensor]) -> None:
        for index, tensor in enumerate(outputs):
            self._origin[id(tensor)] = (ref(tensor), call, index)

    def hold(self, call: ModuleCall, outputs: list[torch.Tensor]) -> None:
        """Hold outputs themselves, until the model's own code changes them in place."""
        for index, tensor in enumerate(outputs):
            call.values[index] = tensor
            self._held.setdefault(storage_key(tensor), []).append((call, index))

    def _set_apart(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors if self._held else ():
            for call, index in self._held.pop(storage_key(tensor), ()):
                call.values[index] = call.values[index].clone()

    def reads(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            origin = self._origin.get(id(tensor))
            if origin is None or origin[0]() is not tensor:  # an id may come back
                continue
            _, call, index = origin
            if index not in call.values:  # a copy: the model may change it in place afterwards
                call.values[index] = tensor.clone()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take the mode off: what runs inside must not see it (compiled blocks refuse modes)."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()
