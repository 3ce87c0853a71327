"""Attributes that the model's forward sets on blocks and layers for their calls.

LoRA layers, for example, get the strength of a call (`scaling` of every adapted layer), and their
old value afterwards. Such a value is the same in each call of one signature: the runs of the graph
set it in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from dit_cache_fx.capture.attributes import (
    MISSING,
    Attributes,
    Change,
    attributes,
    changes,
    get,
    is_plain,
    noted,
    put,
    same,
)
from dit_cache_fx.capture.world import World
from dit_cache_fx.errors import CaptureError
from dit_cache_fx.ir.graph_text import short

_INSTEAD = "Let the block take it as an argument; or make such calls between disable() and enable()"


@dataclass(frozen=True)
class Setting:
    """An attribute that forward sets before it calls `module`."""

    change: Change
    module: str

    def __str__(self) -> str:
        return f"the model's forward sets {self.change} before it calls module '{self.module}'"


class Watch:
    """Records the attributes that the model's own code sets on leaf modules.

    Attributes that the modules set themselves do not count. `suspect`: whether the code has also
    changed something that the modules may read in another way.
    """

    def __init__(self, leaves: Mapping[nn.Module, str], world: World | None) -> None:
        self._leaves = leaves
        self.world = world
        self.suspect = False
        self.known: Attributes = {}
        self.settings: dict[tuple[int, Any], Setting] = {}
        self._called: set[int] = set()
        for module in leaves:
            self.known.update(self._attributes(module))

    def calls(self, module: nn.Module) -> None:
        """Note that the module is about to be called."""
        self.looks()
        now = self._attributes(module)
        for change in changes(self.known, now):
            setting = Setting(change.slim(), self._leaves[module])
            known = self.settings.setdefault(change.place, setting)
            again = id(change.owner.holder) in self._called
            if (known is setting and again) or not same(known.change.now, change.now):
                raise CaptureError(f"{setting}, and to another value for another call. {_INSTEAD}")
        self._called |= now.keys()

    def returned(self, module: nn.Module) -> None:
        """Note that the call of the module has returned."""
        if self.world is not None and not self.suspect:
            self.world.refresh()
        self.known.update(self._attributes(module))

    def looks(self) -> None:
        """Look for changes."""
        if self.world is not None and not self.suspect:
            self.suspect = self.world.changed()

    def _attributes(self, module: nn.Module) -> Attributes:
        name = self._leaves[module]
        return attributes((f"{name}.{n}" if n else name, m) for n, m in module.named_modules())


def refuse_made_values(settings: Sequence[Setting], before: Attributes) -> None:
    """Refuse values that each call creates, such as tensors; `before`: the earlier state."""
    owned = {id(noted(value)) for owner in before.values() for value in owner.values.values()}
    for setting in settings:
        value = noted(setting.change.now)
        if setting.change.in_place or not (is_plain(value) or id(value) in owned):
            raise CaptureError(
                f"{setting} (to a value of type {type(value).__name__}): a graph cannot do the "
                f"same. {_INSTEAD}"
            )


def put_back(settings: Iterable[Setting], before: Attributes) -> None:
    """Restore the values from `before`: runs of a graph leave no setting behind either."""
    for setting in settings:
        holder, key = setting.change.owner.holder, setting.change.key
        owner = before.get(id(holder))
        if owner is not None:
            put(holder, key, owner.values.get(key, MISSING))


def refuse_other_values(settings: Sequence[Setting], name: str) -> None:
    """Refuse if forward calls module `name` with another value when it runs again."""
    for setting in settings:
        now = get(setting.change.owner.holder, setting.change.key)
        if setting.module == name and not same(setting.change.now, now):
            raise CaptureError(
                f"{setting} (to {short(noted(setting.change.now))}), and to another value "
                f"({short(noted(now))}) when it is run again. {_INSTEAD}"
            )


@contextmanager
def applied(settings: Sequence[Setting]) -> Iterator[None]:
    """Set the attributes to the values that forward sets."""
    before: list[tuple[Any, Any, Any]] = []
    try:
        for setting in settings:
            holder, key = setting.change.owner.holder, setting.change.key
            before.append((holder, key, get(holder, key)))
            put(holder, key, setting.change.now)
        yield
    finally:
        for holder, key, value in reversed(before):
            put(holder, key, value)
