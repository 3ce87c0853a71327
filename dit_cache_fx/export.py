"""`export`: a cached model as one program that carries its state; and running such programs."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch

from dit_cache_fx._torch import aoti_load, aoti_package
from dit_cache_fx.cached_model import CachedModel
from dit_cache_fx.capture import CallSignature, FlatCall, flatten_call
from dit_cache_fx.errors import CaptureError, OptionError
from dit_cache_fx.lowering.stateful import State
from dit_cache_fx.values.pytree import Skeleton, unflatten
from dit_cache_fx.values.tensor_spec import TensorSpec

#: (state, inputs) -> (the model's tensors, the new state)
Function = Callable[[State, dict[str, torch.Tensor]], tuple[Sequence[torch.Tensor], State]]

_METADATA = "dit_cache_fx"


def export(
    cached: CachedModel,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    check_conditioning: bool = True,
) -> Exported:
    """Export a cached model for calls like `cached(*args, **kwargs)`.

    The program is `forward(state, inputs) -> (outputs, state)` with dicts of tensors for both, of
    the shapes and dtypes of this call; every other argument is fixed. The step is told from the
    timestep inside the program, and it decides by itself whether to compute. What the model's own
    code has read out of the conditioning here is asserted in it.

    `check_conditioning`: a state belongs to one branch of CFG; a call with another conditioning
    (any input but the sample and the timestep) computes, whatever the schedule says. Turn it off
    where inputs beside the sample change at each step, and give each branch a state of its own.

    Raises:
        OptionError: `cached` is no cached model.
        CaptureError: the program cannot be exported; the text says what is in the way.
    """
    if not isinstance(cached, CachedModel):
        raise OptionError("cached", type(cached).__name__, "what dit_cache_fx.apply returned")
    entry, call, signature = cached._captured(tuple(args), dict(kwargs or {}))
    stateful = entry.stateful(check_conditioning)
    specs = {n: TensorSpec.of(t) for n, t in zip(stateful.inputs, call.tensors, strict=True)}
    timestep_argument = entry.program.timestep_argument
    state = {name: TensorSpec.of(t) for name, t in stateful.initial().items()}
    form = CallForm(signature, timestep_argument, call.skeleton, specs, entry.program.output, state)
    inputs = dict(zip(specs, call.tensors, strict=True))
    try:
        with torch.no_grad(), entry.captured.around():
            program = torch.export.export(stateful, (stateful.initial(), inputs), strict=True)
    except Exception as error:
        raise CaptureError(
            f"torch.export cannot make one program of the cached model: {error}"
        ) from error
    return Exported(program, form)


def load(path: str | PathLike[str]) -> Runner:
    """A runner of what `Exported.package` has written. The file holds code: load your own only.

    Raises `OptionError` where the file is another package.
    """
    function, metadata = aoti_load(path)
    if _METADATA not in metadata:
        raise OptionError("path", str(path), "a file that Exported.package has written")
    form: CallForm = pickle.loads(base64.b64decode(metadata[_METADATA]))
    return Runner(function, form)


@dataclass(frozen=True)
class CallForm:
    """How a program is called: what of a call is fixed, and what it and its state are made of."""

    signature: CallSignature
    timestep_argument: str | None
    skeleton: Skeleton
    inputs: dict[str, TensorSpec]
    output: Skeleton
    state: dict[str, TensorSpec]

    def initial(self) -> State:
        """The state before the first call."""
        return {name: spec.zeros() for name, spec in self.state.items()}

    def tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The inputs of a call by name. Raises `OptionError` where it is not of this form."""
        call = flatten_call(self.signature.bind(args, kwargs), self.timestep_argument)
        if call.skeleton != self.skeleton:
            raise OptionError("arguments", call.names(), "those that the program was exported with")
        for (name, spec), tensor in zip(self.inputs.items(), call.tensors, strict=True):
            if TensorSpec.of(tensor) != spec:
                raise OptionError(name, str(TensorSpec.of(tensor)), f"exported for {spec}")
        return _by_name(self.inputs, call)


def _by_name(names: Mapping[str, Any], call: FlatCall) -> dict[str, torch.Tensor]:
    return dict(zip(names, call.tensors, strict=True))


@dataclass(frozen=True)
class Exported:
    """A cached model as a `torch.export` program, and how it is called."""

    program: torch.export.ExportedProgram
    form: CallForm

    def initial_state(self) -> State:
        """The state before the first call: name -> tensor."""
        return self.form.initial()

    def runner(self) -> Runner:
        """Runs the program as it is, in eager mode."""
        return Runner(self.program.module(), self.form)

    def package(self, path: str | PathLike[str], **inductor_configs: Any) -> Runner:
        """Compile the program with AOTInductor into a `.pt2` file; returns a runner of it.

        `inductor_configs`: options of Inductor. `dit_cache_fx.load(path)` needs no model.
        """
        form = base64.b64encode(pickle.dumps(self.form)).decode()
        aoti_package(self.program, path, {_METADATA: form}, inductor_configs)
        return load(path)


class Runner:
    """Calls an exported program as the model was called, and keeps the state between calls.

    Each `cache_context` has a state of its own; without one, CFG has to be one call a step.
    """

    def __init__(self, function: Function, form: CallForm) -> None:
        self._function = function
        self.form = form
        self._states: dict[Hashable, State] = {}
        self._context: Hashable = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self.form.tensors(args, kwargs)
        state = self._states.get(self._context) or self.form.initial()
        with torch.no_grad():
            outputs, state = self._function(state, inputs)
        self._states[self._context] = state
        return unflatten(self.form.output, list(outputs))

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Calls within belong to the CFG branch `name`."""
        before, self._context = self._context, name
        try:
            yield
        finally:
            self._context = before

    def clear_states(self) -> None:
        """Start the next call with nothing held."""
        self._states.clear()
