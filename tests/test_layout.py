"""Imports inside the package run one way: from the bottom of this list to the top."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import dit_cache_fx

PACKAGE = Path(dit_cache_fx.__file__).parent

#: each may import what stands before it, and its own
LAYERS = (
    "errors",
    "values",
    "_torch",
    "ranks",
    "ir",
    "strategies",
    "capture",
    "passes",
    "lowering",
    "runtime",
    "report",
    "life_cycle",
    "cached_model",
    "forward_patch",
    "pipeline",
    "api",
    "calibration",
    "export",
    "dynamo",
    "helpers",
    "integrations",
    "__init__",
)


def layer(module: str) -> str:
    """`dit_cache_fx.capture.trace` is of the layer `capture`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def files() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(p for p in parts if p != "__init__"), path


def imported(tree: ast.Module) -> Iterator[str]:
    """The package's modules that a file imports, inside of functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "dit_cache_fx":
                yield from (f"dit_cache_fx.{alias.name}" for alias in node.names)
            elif node.module.startswith("dit_cache_fx."):
                yield node.module


def arrows_up() -> list[str]:
    return [
        f"{name} imports {target}"
        for name, path in files()
        for target in imported(ast.parse(path.read_text()))
        if LAYERS.index(layer(target)) > LAYERS.index(layer(name))
    ]


def test_every_file_belongs_to_a_layer() -> None:
    assert {layer(name) for name, _ in files()} == set(LAYERS)


def test_the_page_has_a_line_for_each_layer_in_this_order() -> None:
    page = (PACKAGE.parent / "docs" / "layout.md").read_text()
    table = page[page.index("| module |") :].split("\n\n")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, re.M)) == LAYERS


def test_a_folder_of_tests_is_a_room_or_stands_in_the_page() -> None:
    page = (PACKAGE.parent / "docs" / "layout.md").read_text()
    across = set(re.findall(r"^\| `tests/(\w+)` \|", page, re.M))
    folders = {path.parent.name for path in Path(__file__).parent.glob("*/__init__.py")}
    assert folders - across <= set(LAYERS)
    assert across <= folders


def test_no_import_runs_up() -> None:
    assert arrows_up() == []


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=lambda p: p.parent.name)
def test_init_files_export_and_hold_nothing_else(path: Path) -> None:
    for node in ast.parse(path.read_text()).body:
        doc = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        names = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in (
            "__all__",
            "__version__",
        )
        assert doc or names or isinstance(node, ast.ImportFrom), ast.unparse(node)
