"""What a block is given after hooks have split its arguments.

In context parallelism the first block may be called with the whole sequence: a hook at the block
leaves each process its part, and the block returns a part. So what goes through the block is told
by what the hook leaves of the argument. Such hooks are those of diffusers' `enable_parallelism`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from dit_cache_fx.values.pytree import Skeleton, flatten, unflatten

#: from a block's tensors and what else it is called with: the tensors that it gets
Split = Callable[[Sequence[torch.Tensor], Skeleton], list[torch.Tensor]]


def split_of(module: nn.Module) -> Split | None:
    """What hooks split of a module's arguments; None where none does."""
    hooks = _splitting(module)
    return partial(_split, module, hooks) if hooks else None


def _splitting(module: nn.Module) -> list[Any]:
    """The hooks that split, the outermost first."""
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
