"""Find forward's timestep argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dit_cache_fx.capture.signature import FlatCall
from dit_cache_fx.errors import DiscoveryError, OptionError

#: usual names in this field, the most specific first
NAMES = ("timestep", "timesteps", "t", "time", "time_step", "sigma", "sigmas", "noise_level")

#: those that also count as a word of a longer name
_WORDS = frozenset({"timestep", "timesteps", "sigma", "sigmas"})


def named_timestep(parameters: Sequence[str], given: str | None, more: bool = False) -> str | None:
    """Return the timestep argument by its name; None if no parameter has a usual one.

    Raises `OptionError` if `given` is no parameter (unless forward takes `more`: `**kwargs`).
    """
    if given is not None:
        if given not in parameters and not more:
            raise OptionError(
                "timestep", given, f"forward has no such argument; it has {list(parameters)}"
            )
        return given
    return next((name for name in NAMES if name in parameters), None)


def tells_time(argument: str, timestep: str | None = None) -> bool:
    """Return whether an argument has the name of a timestep, so that it changes with the steps.

    If the timestep has another name (`image_time`), its last word counts too.
    """
    words = argument.split("_")
    alike = timestep is not None and words[-1] == timestep.split("_")[-1]
    return argument in NAMES or alike or bool(_WORDS.intersection(words))


def guessed_timestep(call: FlatCall) -> str:
    """Return the only argument with a timestep's form: one number, or one for each sample.

    If there are several, the only one with a usual name among the words of its own
    (`image_timesteps`). Raises `DiscoveryError` with the candidates if neither rule gives one.
    """
    candidates = [
        argument
        for tensor, argument in zip(call.tensors, call.arguments_of(), strict=True)
        if tensor.ndim <= 1 and tensor.dtype != torch.bool and not tensor.is_complex()
    ]
    named = [name for name in candidates if _WORDS.intersection(name.split("_"))]
    telling = candidates if len(candidates) == 1 else named
    if len(telling) != 1:
        raise DiscoveryError(
            "cannot determine the timestep argument: no argument has a usual name "
            f"({', '.join(NAMES)}), and those of its form are {candidates}. Name it: "
            "timestep='...'"
        )
    return telling[0]
