"""Capture a model's forward as a checked program."""

from dit_cache_fx.capture.captured import (
    Captured,
    Shapes,
    Subject,
    accepts,
    can_replay,
    replayed,
)
from dit_cache_fx.capture.eager import capture
from dit_cache_fx.capture.leaves import BlockList, candidate_lists, named_list
from dit_cache_fx.capture.signature import CallSignature, FlatCall, flatten_call
from dit_cache_fx.capture.timestep import guessed_timestep, named_timestep

__all__ = [
    "BlockList",
    "CallSignature",
    "Captured",
    "FlatCall",
    "Shapes",
    "Subject",
    "accepts",
    "can_replay",
    "candidate_lists",
    "capture",
    "flatten_call",
    "guessed_timestep",
    "named_list",
    "named_timestep",
    "replayed",
]
