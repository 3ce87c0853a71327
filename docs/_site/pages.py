"""MkDocs hooks: pages of the site that live elsewhere in the repository, and links to them.

Markdown files link to each other by their places in the repository, so that the links work where
the repository is browsed too. The build turns them into links between pages. A link to a file that
is no page keeps its text only.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCS = PurePosixPath("docs")
#: page of the site -> file of the repository
ELSEWHERE = {
    "index.md": "README.md",
    "digits.md": "examples/digits/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
_LINK = re.compile(r"\[(?P<text>[^]]*)\]\((?P<target>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that live outside of docs/."""
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page."""
    uri = page.file.src_uri
    folder = PurePosixPath(ELSEWHERE.get(uri, DOCS / uri)).parent

    def rewritten(link: re.Match[str]) -> str:
        path = os.path.normpath(folder / link["target"])
        if not (ROOT / path).exists():  # no link, or a wrong one: the strict build tells
            return link[0]
        target = place_of(path)
        if target is None:
            return link["text"]
        return f"[{link['text']}]({from_page(uri, target)}{link['anchor'] or ''})"

    return _LINK.sub(rewritten, markdown)


def place_of(path: str) -> str | None:
    """The place of a repository's file in the site; None where it has none."""
    pages = {source: page for page, source in ELSEWHERE.items()}
    if path in pages:
        return pages[path]
    inside = PurePosixPath(path)
    return str(inside.relative_to(DOCS)) if inside.is_relative_to(DOCS) else None


def from_page(page: str, target: str) -> str:
    """A link from one place of the site to another."""
    return os.path.relpath(target, PurePosixPath(page).parent)
