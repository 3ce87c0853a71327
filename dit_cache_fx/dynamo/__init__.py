"""`backend`: the same passes on the graph that `torch.compile` captures."""

from dit_cache_fx.dynamo.backend import backend, registered
from dit_cache_fx.dynamo.front_end import Backend

__all__ = ["Backend", "backend", "registered"]
