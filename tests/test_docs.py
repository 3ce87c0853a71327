"""What the README and the pages of docs/ show runs, and prints what they say that it prints."""

from __future__ import annotations

import contextlib
import io
import re
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

#: a block that does not run has this above it: `<!-- not run: the reason -->`
_BLOCK = re.compile(
    r"^(?P<skip><!-- not run: .+ -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)


class Example(NamedTuple):
    """A block of code, and the block of text behind it: what it prints, where it prints."""

    line: int
    code: str
    printed: str


def examples(page: Path) -> list[Example]:
    """The Python blocks of a page that run, in order."""
    text = page.read_text()
    blocks = list(_BLOCK.finditer(text))
    found = []
    for block, after in zip_longest(blocks, blocks[1:]):
        if block["language"] == "python" and not block["skip"]:
            line = text[: block.start()].count("\n") + 1
            follows = after is not None and not text[block.end() : after.start()].strip()
            shown = after is not None and follows and after["language"] == "text"
            found.append(Example(line, block["text"], after["text"] if shown else ""))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for example in examples(page):
        torch.manual_seed(0)
        padding = "\n" * example.line  # so that a traceback has the page's own lines
        code = compile(padding + example.code, str(page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(code, names)
        if example.printed:
            assert output.getvalue() == example.printed, f"{page.name}:{example.line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_tests_that_a_page_names_are_there(page: Path) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text())
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not (ROOT / file).exists() or f"def {name}(" not in (ROOT / file).read_text()
    ]
    assert missing == []
