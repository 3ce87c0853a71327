"""A calibration as text, as a file, and as a picture."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dit_cache_fx import Calibration, MissingPackageError, NewtonCache, OptionError
from dit_cache_fx.calibration import Row
from dit_cache_fx.calibration.row import calibrated
from tests.calibration.test_plans import CALLED, PLANNED, TOY, front


def test_the_table() -> None:
    found = front()
    rows = (replace(found.rows[0], plain=30.25), *found.rows[1:])
    assert str(replace(found, rows=rows)).splitlines() == [
        "ToyDiT, 8 steps, 4 runs; PSNR to every step computed",
        "computed    dB  lowest  preset  plain  plan",
        "       3  41.0    38.0    39.0   30.2  taylorcache, max_order 1, corrector 0.5, searched",
        "       4  45.5    42.5    43.5      -  taylorcache, max_order 1, corrector 0.5, searched",
        "       6  44.0    41.0    42.0      -  taylorcache, max_order 1, corrector 0.5, searched",
    ]


def test_a_file_gives_the_same_again(tmp_path: Path) -> None:
    predictor = NewtonCache(
        no_cache_steps={0}, corrector=1.0, axis="timestep", no_cache_block_id={"blocks": {2, 0}}
    )
    plan = calibrated(predictor, PLANNED, CALLED, TOY)
    found = front()
    row = Row(5, plan, "even in timestep", 50.125, float("-inf"), 49.0, 20.0)
    found = replace(found, rows=(*found.rows, row))
    found.save(tmp_path / "toy.json")
    assert Calibration.load(tmp_path / "toy.json") == found
    data = json.loads((tmp_path / "toy.json").read_text())
    assert data["model"] == {"model": "ToyDiT", "blocks": {"blocks": 3}, "width": 8}
    assert data["rows"][-1]["strategy"] == "newtoncache"
    assert data["rows"][-1]["steps"] == [0, 2, 5, 7]
    assert data["rows"][-1]["lowest"] is None


def broken(**changes: Any) -> str:
    return json.dumps({"format": "dit_cache_fx calibration", "version": 1, **changes})


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("no json", "a file that Calibration.save has written"),
        ("[1, 2]", "a file that Calibration.save has written"),
        ('{"format": "other"}', "a file that Calibration.save has written"),
        (broken(), "a file that Calibration.save has written .KeyError"),
        (broken(version=7), "version 1 of the format; this file has 7"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(OptionError, match=rf"^path='.*other.json': {match}"):
        Calibration.load(path)


def changed(tmp_path: Path, **row: Any) -> Path:
    path = tmp_path / "changed.json"
    front().save(path)
    data = json.loads(path.read_text())
    data["rows"][0].update(row)
    path.write_text(json.dumps(data))
    return path


def test_a_file_of_unknown_strategies_or_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="strategy='new': one of"):
        Calibration.load(changed(tmp_path, strategy="new"))
    with pytest.raises(OptionError, match="new_option=1: taylorcache has no such option"):
        Calibration.load(changed(tmp_path, options={"new_option": 1}))
    with pytest.raises(OptionError, match=r"a file that Calibration\.save has written"):
        Calibration.load(changed(tmp_path, steps=[0, 8]))
    with pytest.raises(OptionError, match=r"a file that Calibration\.save has written"):
        Calibration.load(changed(tmp_path, steps=None))


def test_the_picture_has_a_curve_for_each_kind(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = front()
    (axes,) = found.plot(tmp_path / "front.png").axes
    assert (tmp_path / "front.png").stat().st_size > 1000
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert lines == {"calibrated plans": [41.0, 45.5, 44.0], "presets": [39.0, 43.5, 42.0]}
    rows = (replace(found.rows[0], plain=30.0), *found.rows[1:])
    (axes,) = replace(found, rows=rows).plot().axes
    assert list(axes.get_lines()[2].get_xdata()) == [3]
    assert list(axes.get_lines()[2].get_ydata()) == [30.0]


def test_the_picture_needs_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match="matplotlib"):
        front().plot()
