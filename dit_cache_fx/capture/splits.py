"""The arguments of a block after hooks have split them (context parallelism).

The first block may be called with the whole sequence: a hook at the block leaves each process its
part, and the block returns a part. So the shapes inside the trunk are those after the hook. Such
hooks come from diffusers' `enable_parallelism`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from dit_cache_fx.values.pytree import Skeleton, flatten, unflatten

#: (a block's tensors, the skeleton of its call) -> the tensors that the block gets
Split = Callable[[Sequence[torch.Tensor], Skeleton], list[torch.Tensor]]


def split_of(module: nn.Module) -> Split | None:
    """Return the function that hooks apply to a module's arguments; None if no hook splits them."""
    hooks = _splitting(module)
    return partial(_split, module, hooks) if hooks else None


def _splitting(module: nn.Module) -> list[Any]:
    """Return the hooks that split, the outermost first."""
    registry: Any = vars(module).get("_diffusers_hook")
    hooks = [] if registry is None else [registry.hooks[n] for n in reversed(registry._hook_order)]
    return [hook for hook in hooks if hasattr(hook, "parallel_config")]


def _split(
    module: nn.Module, hooks: Sequence[Any], tensors: Sequence[torch.Tensor], given: Skeleton
) -> list[torch.Tensor]:
    args, kwargs = unflatten(given, list(tensors))
    for hook in hooks:
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
    return flatten((tuple(args), kwargs))[0]
