"""`export`: turn a cached model into one program that carries its state, and run such programs."""

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

    The program is `forward(state, inputs) -> (outputs, state)`. State and inputs are dicts of
    tensors, with the shapes and dtypes of this call; every other argument is fixed. The program
    determines the step from the timestep, and decides by itself whether to compute. It asserts the
    values that the model's own code has read from the conditioning in this call.

    Args:
        cached (`CachedModel`):
            The model that `apply` returned.
        args (`Sequence[Any]`, defaults to `()`):
            The positional arguments of a call.
        kwargs (`Mapping[str, Any]`, *optional*):
            The keyword arguments of the call.
        check_conditioning (`bool`, defaults to `True`):
            Compute when the conditioning (any input but the sample and the timestep) differs from
            that of the state, whatever the schedule says: a state belongs to one branch of CFG.
            Turn it off if inputs other than the sample change at each step, and give each branch
            its own state.

    Returns:
        The exported program, with the form of its calls.

    Raises:
        OptionError: `cached` is no cached model.
        CaptureError: The program cannot be exported. The text names the cause.

    Example:
        >>> exported = dit_cache_fx.export(cached, (sample, timestep, prompt))
        >>> runner = exported.runner()
        >>> noise = runner(sample, timestep, prompt)
    """
    if not isinstance(cached, CachedModel):
        raise OptionError(
            "cached", type(cached).__name__, "the cached model that dit_cache_fx.apply returned"
        )
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
    """Load a program that `Exported.package` has written.

    The file contains code: load only files that you trust.

    Args:
        path (`str | PathLike[str]`):
            The `.pt2` file.

    Returns:
        A runner, called as the model was.

    Raises:
        OptionError: The file is another package.

    Example:
        >>> runner = exported.package("model.pt2")
        >>> runner = dit_cache_fx.load("model.pt2")
        >>> noise = runner(sample, timestep, prompt)
    """
    function, metadata = aoti_load(path)
    if _METADATA not in metadata:
        raise OptionError("path", str(path), "a file that Exported.package has written")
    form: CallForm = pickle.loads(base64.b64decode(metadata[_METADATA]))
    return Runner(function, form)


@dataclass(frozen=True)
class CallForm:
    """The form of a program's calls: fixed arguments, and specs of its inputs and state."""

    signature: CallSignature
    timestep_argument: str | None
    skeleton: Skeleton
    inputs: dict[str, TensorSpec]
    output: Skeleton
    state: dict[str, TensorSpec]

    def initial(self) -> State:
        """Return the state before the first call."""
        return {name: spec.zeros() for name, spec in self.state.items()}

    def tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return the inputs of a call by name. Raises `OptionError` for another form."""
        call = flatten_call(self.signature.bind(args, kwargs), self.timestep_argument)
        if call.skeleton != self.skeleton:
            raise OptionError(
                "arguments", call.names(), "the arguments that the program was exported with"
            )
        for (name, spec), tensor in zip(self.inputs.items(), call.tensors, strict=True):
            if TensorSpec.of(tensor) != spec:
                raise OptionError(name, str(TensorSpec.of(tensor)), f"exported for {spec}")
        return _by_name(self.inputs, call)


def _by_name(names: Mapping[str, Any], call: FlatCall) -> dict[str, torch.Tensor]:
    return dict(zip(names, call.tensors, strict=True))


@dataclass(frozen=True)
class Exported:
    """A cached model as a `torch.export` program, and the form of its calls.

    Attributes:
        program (`torch.export.ExportedProgram`):
            The program: `forward(state, inputs) -> (outputs, state)`.
        form (`CallForm`):
            The form of a call: names, shapes and dtypes of its inputs and of the state.

    Example:
        >>> exported = dit_cache_fx.export(cached, (sample, timestep, prompt))
        >>> state = exported.initial_state()
        >>> inputs = {"x": sample, "timestep": timestep, "text": prompt}
        >>> outputs, state = exported.program.module()(state, inputs)
    """

    program: torch.export.ExportedProgram
    form: CallForm

    def initial_state(self) -> State:
        """Return the state before the first call, a tensor for each name."""
        return self.form.initial()

    def runner(self) -> Runner:
        """Return a runner of the program in eager mode."""
        return Runner(self.program.module(), self.form)

    def package(self, path: str | PathLike[str], **inductor_configs: Any) -> Runner:
        """Compile the program with AOTInductor into a file, and return a runner of it.

        `dit_cache_fx.load(path)` loads it again, without the model.

        Args:
            path (`str | PathLike[str]`):
                The `.pt2` file to write.
            inductor_configs (`Any`):
                Options of Inductor.

        Example:
            >>> runner = exported.package("model.pt2")
        """
        form = base64.b64encode(pickle.dumps(self.form)).decode()
        aoti_package(self.program, path, {_METADATA: form}, inductor_configs)
        return load(path)


class Runner:
    """An exported program that is called as the model was, and keeps the state between calls.

    Each `cache_context` has its own state. Without one, batch CFG into one call per step.

    Attributes:
        form (`CallForm`):
            The form of a call: names, shapes and dtypes of its inputs and of the state.

    Example:
        >>> runner = dit_cache_fx.export(cached, (sample, timestep, prompt)).runner()
        >>> noise = runner(sample, timestep, prompt)
        >>> runner.clear_states()
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
        """Return a context whose calls belong to one branch of CFG.

        Args:
            name (`str`):
                The name of the branch, such as "cond".

        Example:
            >>> with runner.cache_context("cond"):
            ...     noise = runner(sample, timestep, prompt)
        """
        before, self._context = self._context, name
        try:
            yield
        finally:
            self._context = before

    def clear_states(self) -> None:
        """Forget the cached tensors: the next call computes."""
        self._states.clear()
