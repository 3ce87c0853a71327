"""`docs/support.md` names every class of diffusers, and says what a run gives.

Each third of the classes that no other test has is run here, as far as the eager columns; with
`-m exhaustive` all of them. The whole page is compared by `python -m tests.support.table --check`.
"""

from __future__ import annotations

import re
from pathlib import Path

import diffusers
import pytest

TEXT = (Path(__file__).parents[1] / "docs" / "support.md").read_text()

if f"diffusers {diffusers.__version__}," not in TEXT:
    pytest.skip("the page is of another diffusers", allow_module_level=True)

from tests.support.case import SupportCase
from tests.support.checks import EAGER, YES, look, look_further
from tests.support.classes import OUTSIDE, SUPPORT, ZOO, exported
from tests.support.table import COLUMNS, PAGE, page, rows_on

ROWS = rows_on(TEXT)
OTHERS = [case for case in SUPPORT if case not in ZOO]
SOME = OTHERS[::6]

#: what diffusers and torch say of the models' own code
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning"),
]


def test_every_class_is_in_the_table_or_named_with_a_reason() -> None:
    cases = [case.name for case in SUPPORT]
    assert len(set(cases)) == len(cases)
    assert {*cases, *OUTSIDE} == exported()
    assert not OUTSIDE.keys() & set(cases)
    assert list(ROWS) == cases
    for name, reason in OUTSIDE.items():
        assert f"- `{name}`: {reason}\n" in TEXT


def test_the_page_is_written_by_the_table() -> None:
    """Nothing was added by hand: written again from its own cells, it is the same."""
    notes = dict(re.findall(r"^(\d+)\. (.*)$", TEXT, re.MULTILINE))

    def cell(text: str) -> str:
        noted = re.fullmatch(r"\w+ \((\d+)\)", text)
        return notes[noted[1]] if noted else text

    again = page([name, *map(cell, cells)] for name, cells in ROWS.items())
    assert again.splitlines()[7:] == TEXT.splitlines()[7:]
    assert PAGE.read_text() == TEXT


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=() if c in SOME else pytest.mark.exhaustive) for c in OTHERS],
)
def test_the_eager_columns_of_a_class(case: SupportCase) -> None:
    _, cells = look(case)
    assert cells == ROWS[case.name][: 1 + len(EAGER)]
    assert cells[1:] == [YES] * len(EAGER)


@pytest.mark.exhaustive
def test_the_other_columns_of_a_class() -> None:
    name = "MiniMaxMusic3Transformer1DModel"
    seen, cells = look(next(case for case in SUPPORT if case.name == name))
    assert seen is not None
    assert [*cells, *look_further(seen)] == ROWS[name]
    assert len(ROWS[name]) == len(COLUMNS) - 1
