"""Seeing (and answering) the calls of chosen modules while a model's forward runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from dit_cache_fx._torch import not_a_compiled_frame

#: (module, its name, run it for real, args, kwargs) -> what the caller gets
Handler = Callable[[nn.Module, str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

#: torch.fx's own tracer replaces Module.__call__ in the same way; two captures in two threads
#: must not restore each other's replacement: a capture holds this from its start to its end
CAPTURING = threading.RLock()


@contextmanager
def intercepted(names: Mapping[nn.Module, str], handler: Handler) -> Iterator[None]:
    """Within the context, a call of a module in `names` goes to `handler`.

    Only calls of this thread, and only the outermost: what a handled module calls inside runs as
    always, `Module.__call__` itself put back, since a block that is compiled there would be
    compiled again once it is. That is the one place that hooks, compiled blocks
    (`block.compile()`) and replaced forwards all pass through.
    """
    owner = threading.get_ident()

    with CAPTURING:
        original = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if module not in names or threading.get_ident() != owner:
                return original(module, *args, **kwargs)
            nn.Module.__call__ = original  # type: ignore[method-assign]
            try:
                return handler(module, names[module], original, args, kwargs)
            finally:
                nn.Module.__call__ = call  # type: ignore[method-assign]

        call.captures = owner  # type: ignore[attr-defined]
        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]


@not_a_compiled_frame
def capturing() -> bool:
    """Whether a capture is under way in this thread."""
    return getattr(nn.Module.__call__, "captures", None) == threading.get_ident()
