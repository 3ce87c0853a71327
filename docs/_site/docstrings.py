"""A griffe extension: docstrings in the manner of diffusers, as the site shows them.

The argument list of a docstring reads

    threshold (`float`, defaults to `0.05`):
        From this change on a step computes.

The site takes the type from it and the default from the signature. The list of a class goes on
with the arguments that it inherits. Comments that begin with `#:` document an attribute.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from griffe import Class, Docstring, Extension, Module, Object

_HEAD = re.compile(r"^    (\w+) \(`(.+?)`.*\):$", re.M)
_ARGS = re.compile(r"^Args:\n((?:    .*\n|\n(?=    ))*)", re.M)
_ARG = re.compile(r"^    (\w+) \(.*\n(?:        .*\n|\n(?=        ))*", re.M)


class DiffusersDocstrings(Extension):
    """Rewrites the docstrings of a package when it is loaded."""

    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        for item in members(pkg):
            if item.is_attribute and not item.docstring and (text := comment_above(item)):
                item.docstring = Docstring(text, parent=item)
        objects = [item for item in members(pkg) if item.docstring]
        for item in objects:
            if isinstance(item, Class):
                inherit(item)
        for item in objects:
            item.docstring.value = in_google_style(item.docstring.value)


def members(parent: Object) -> Iterator[Object]:
    """Everything that is defined in it."""
    for member in parent.members.values():
        if not member.is_alias:
            yield member
            yield from members(member)


def comment_above(item: Object) -> str:
    """The lines above an attribute that begin with `#:`."""
    above = reversed(item.lines_collection[item.filepath][: item.lineno - 1])
    comment = takewhile(lambda line: line.startswith("#:"), map(str.strip, above))
    text = "\n".join(reversed([line.removeprefix("#:").strip() for line in comment]))
    return text[:1].upper() + text[1:] + "." * bool(text)


def inherit(cls: Class) -> None:
    """Append the arguments of its bases to the argument list of a class, if it takes them."""
    text = cls.docstring.value + "\n"
    listed, own = arguments(text), cls.members.get("__init__")
    for base in cls.mro():
        inherited = arguments(base.docstring.value) if base.docstring else {}
        known = [n for n in inherited if own is None or n in own.parameters]
        listed |= {name: inherited[name] for name in known if name not in listed}
    if listed:
        section = f"Args:\n{''.join(listed.values())}\n"
        before, after = around_arguments(text)
        cls.docstring.value = f"{before.rstrip()}\n\n{section}{after}"


def around_arguments(text: str) -> tuple[str, str]:
    """What stands before and behind the argument list of a docstring, or before its place."""
    if found := _ARGS.search(text):
        return text[: found.start()], text[found.end() :]
    place = re.search(r"^(?:Raises|Example):$|\Z", text, re.M)
    return text[: place.start()], text[place.start() :]


def arguments(text: str) -> dict[str, str]:
    """The items of a docstring's argument list by name."""
    found = _ARGS.search(text + "\n")
    return {item[1]: item[0] for item in _ARG.finditer(found[1])} if found else {}


def in_google_style(text: str) -> str:
    """Argument types as griffe reads them; one example is a section like several."""
    return _HEAD.sub(r"    \1 (\2):", text).replace("Example:\n", "Examples:\n")
