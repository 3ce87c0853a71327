"""The API reference: complete, and its docstrings agree with the code.

A docstring lists arguments in the manner of diffusers:

    threshold (`float`, defaults to `0.05`):
        From this change on a step computes.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import pytest

import dit_cache_fx
from dit_cache_fx import Strategy, helpers
from dit_cache_fx.strategies.registry import KINDS
from tests.api_examples import VLLM_OMNI, module_of, run_example

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = dit_cache_fx.__name__
REFERENCE = ROOT / "docs" / "reference"

_SECTION = re.compile(r"^(Args|Attributes|Example):\n((?:    .*\n|\n(?=    ))+)", re.M)
_ITEM = re.compile(
    r"^(?P<name>\w+) \(`(?P<type>[^`]+)`(?P<more>.*)\):\n(?P<meaning>    \S.*)$", re.M
)
_MORE = re.compile(r"(|, \*optional\*|, defaults to `(?P<default>.+)`)")


class Described(NamedTuple):
    """An argument as its docstring has it; `default` is code."""

    default: str | None
    required: bool


def section(item: Any, title: str) -> str:
    """A section of its own docstring, without its indent; empty where there is none."""
    text = inspect.cleandoc(own_docstring(item)) + "\n"
    found = {name: textwrap.dedent(body) for name, body in _SECTION.findall(text)}
    return found.get(title, "")


def described(item: Any, title: str = "Args") -> dict[str, Described]:
    """What a list of a docstring says of each of its items; each has to be of the one form."""
    listed: dict[str, Described] = {}
    heads = [line for line in section(item, title).splitlines() if line[:1].strip()]
    items = list(_ITEM.finditer(section(item, title)))
    assert len(items) == len(heads), f"{item}: not of the form `name (type, default):` in {heads}"
    for found in items:
        more = _MORE.fullmatch(found["more"])
        assert more, f"{item}: {found[0]}"
        optional = found["more"] == ", *optional*"
        listed[found["name"]] = Described(
            "None" if optional else more["default"], not optional and more["default"] is None
        )
    return listed


def own_docstring(item: Any) -> str:
    """Its own docstring, without what a class inherits."""
    return (vars(item).get("__doc__") if inspect.isclass(item) else item.__doc__) or ""


def shown() -> dict[str, list[str] | None]:
    """What the pages show: path -> the members that are listed, None for all public ones."""
    pages = "\n".join(page.read_text() for page in sorted(REFERENCE.glob("*.md"))) + "\n"
    found: dict[str, list[str] | None] = {}
    for path, options in re.findall(r"^::: (\S+)\n((?: +.*\n)*)", pages, re.M):
        listed = re.search(r"members: (?:false|\[(.*)\])", options)
        found[path] = None if listed is None else re.findall(r"\w+", listed[1] or "")
    return found


def at(path: str) -> Any:
    """The object of a path: `dit_cache_fx.apply`."""
    module, _, name = path.rpartition(".")
    return getattr(_VLLM if module == VLLM_OMNI else module_of(module), name)


_VLLM = module_of(VLLM_OMNI)


def public() -> list[Any]:
    """The classes and functions that the pages show."""
    return [x for x in map(at, shown()) if inspect.isclass(x) or inspect.isfunction(x)]


def members(path: str) -> dict[str, Any]:
    """What the pages show of a class, inherited members included."""
    listed, bases = shown()[path], [k for k in at(path).__mro__ if k.__module__.startswith(PACKAGE)]
    all_ = {name: member for kind in reversed(bases) for name, member in vars(kind).items()}
    return {n: m for n, m in all_.items() if (n[0] != "_" if listed is None else n in listed)}


def functions() -> list[FunctionType]:
    """The functions and methods that the pages show."""
    free = [item for item in public() if inspect.isfunction(item)]
    classes = [path for path in shown() if inspect.isclass(at(path))]
    methods = [inspect.unwrap(m) for path in classes for m in members(path).values()]
    return [*free, *filter(inspect.isfunction, methods)]


def properties() -> list[property]:
    classes = [path for path in shown() if inspect.isclass(at(path))]
    return [m for path in classes for m in members(path).values() if isinstance(m, property)]


def with_init() -> list[type]:
    """The classes that are made by calling an `__init__` of their own."""
    written = [x for x in public() if isinstance(vars(x).get("__init__"), FunctionType)]
    return [x for x in written if not dataclasses.is_dataclass(x) and section(x, "Args")]


def examples() -> dict[str, str]:
    """Each `Example:` on the pages, by the path of what it is for."""
    found = {path: section(at(path), "Example") for path in shown()}
    for path in filter(lambda path: inspect.isclass(at(path)), shown()):
        found |= {f"{path}.{n}": section(m, "Example") for n, m in members(path).items()}
    return {path: text for path, text in found.items() if text}


def dataclasses_with(title: str) -> list[type]:
    return [x for x in public() if dataclasses.is_dataclass(x) and section(x, title)]


def own_fields(kind: type) -> dict[str, dataclasses.Field[Any]]:
    """The fields that a dataclass defines itself."""
    return {f.name: f for f in dataclasses.fields(kind) if f.name in vars(kind)["__annotations__"]}


def named(item: Any) -> str:
    return item.__qualname__


# --- the pages -----------------------------------------------------------------------------------


def test_every_public_name_is_on_a_page() -> None:
    on_pages = {id(at(path)) for path in shown()}
    rooms = (dit_cache_fx, helpers)
    exported = {name: getattr(room, name) for room in rooms for name in room.__all__}
    assert [name for name, item in exported.items() if id(item) not in on_pages] == []


def test_a_listed_member_is_there() -> None:
    for path, listed in shown().items():
        assert set(listed or ()) <= set(dir(at(path))), path


def test_every_page_is_in_the_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text()
    pages = [p.relative_to(ROOT / "docs") for p in (ROOT / "docs").rglob("*.md")]
    assert [str(page) for page in pages if f": {page}\n" not in config] == []


# --- the docstrings ------------------------------------------------------------------------------


@pytest.mark.parametrize("item", [*public(), *functions()], ids=named)
def test_everything_has_a_docstring(item: Any) -> None:
    assert own_docstring(item)


def test_every_property_has_a_docstring() -> None:
    assert len(properties()) > 5
    assert [item for item in properties() if not item.__doc__] == []


@pytest.mark.parametrize("function", functions(), ids=named)
def test_every_argument_of_a_function_is_described(function: FunctionType) -> None:
    parameters = dict(inspect.signature(function).parameters)
    parameters.pop("self", None)
    assert_described(function, parameters)


@pytest.mark.parametrize("kind", with_init(), ids=named)
def test_every_argument_of_a_class_is_described(kind: type) -> None:
    """Those that it takes over from its base are the base's to describe."""
    parameters = dict(inspect.signature(kind).parameters)
    inherited = described(kind.__mro__[1])
    assert_described(kind, {n: p for n, p in parameters.items() if n not in inherited})


def assert_described(item: Any, parameters: Mapping[str, inspect.Parameter]) -> None:
    listed = described(item)
    assert list(listed) == list(parameters)
    for name, parameter in parameters.items():
        free = parameter.default is parameter.empty
        assert listed[name].required == free, name
        assert free or ast.literal_eval(listed[name].default or "") == parameter.default, name


@pytest.mark.parametrize("kind", [Strategy, *KINDS], ids=named)
def test_every_option_of_a_strategy_is_described(kind: type[Strategy]) -> None:
    listed = described(kind)
    assert list(listed) == list(own_fields(kind))
    for name, field in own_fields(kind).items():
        assert not listed[name].required, name
        assert ast.literal_eval(listed[name].default or "") == field.default, name


@pytest.mark.parametrize("title", ["Args", "Attributes"])
def test_every_field_of_a_dataclass_is_described(title: str) -> None:
    kinds = dataclasses_with(title)
    assert len(kinds) > 3
    for kind in kinds:
        assert list(described(kind, title)) == list(own_fields(kind)), kind


def test_every_dataclass_is_described() -> None:
    kinds = {x for x in public() if dataclasses.is_dataclass(x) and own_fields(x)}
    assert kinds == {*dataclasses_with("Args"), *dataclasses_with("Attributes")}


# --- the examples --------------------------------------------------------------------------------


#: examples that compile for many seconds
_LONG = {
    "dit_cache_fx.load",
    "dit_cache_fx.Exported",
    "dit_cache_fx.Exported.package",
    "dit_cache_fx.Runner",
    "dit_cache_fx.calibrate",
}


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=pytest.mark.exhaustive if p in _LONG else ()) for p in examples()],
)
def test_an_example_runs(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_example(examples()[path])


@pytest.mark.parametrize("item", public(), ids=named)
def test_what_a_user_calls_has_an_example(item: Any) -> None:
    called = inspect.isfunction(item) or section(item, "Args")
    assert section(item, "Example") or not called


@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_the_example_of_a_strategy_applies_it(kind: type[Strategy]) -> None:
    assert f'dit_cache_fx.apply(model, "{kind.name}", ' in section(kind, "Example")
