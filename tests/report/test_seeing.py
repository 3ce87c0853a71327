"""What a user can look at: `explain()`, `plot()`, the logs, and torch's structured trace."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_cache_fx
from dit_cache_fx import DeepCache, DitCacheError, MissingPackageError, TeaCache
from dit_cache_fx.ir.graph_text import lines, ranges
from dit_cache_fx.report.plot import ACTIONS, branches, step_map
from tests.toys import DEPTH, DIM, TOKENS, MaskedDiT, ReadingDiT, ToyDiT, make, toy_inputs

ROOT = Path(__file__).resolve().parents[2]


def cached_toy(strategy: Any = "deepcache", **options: Any) -> Any:
    if isinstance(strategy, str) and "rel_l1_thresh" not in options:
        options.setdefault("no_cache_steps", {0, 2})
    return dit_cache_fx.apply(make(ToyDiT), strategy, **options)


def sample(model: Any, steps: int = 4, **more: Any) -> None:
    """A generation: another picture and a lower timestep on each step."""
    with torch.no_grad():
        for step in range(steps):
            model(**toy_inputs(1000.0 - 50 * step, seed=step), **more)


# --- explain -----------------------------------------------------------------------------------


def test_before_the_first_call_it_says_what_to_do() -> None:
    text = str(cached_toy().explain())
    assert "call the model once" in text
    assert "on steps 0, 2 (2 in all)" in text


def test_explain_is_meant_to_be_read() -> None:
    cached = cached_toy(no_cache_block_id={"blocks": {1}})
    sample(cached, 2)
    assert str(cached.explain()) == repr(cached.explain()) == EXPLAINED.strip()


EXPLAINED = """
deepcache: computes on a generation's first step, on steps 0, 2 (2 in all), and when nothing is \
held; all other steps are reused
graph 1, for x[1, 6, 8], timestep[1], text[1, 4, 8]
  block lists: blocks (3 blocks)
  timestep: argument 'timestep'
  cached run 0: blocks.0
    holds model_blocks_0 of blocks.0: torch.float32[1, 6, 8] on cpu, 192 B
  cached run 1: blocks.2
    holds model_blocks_2 of blocks.2: torch.float32[1, 6, 8] on cpu, 192 B
  always run: blocks.1
  data guards: none
  nodes: 14 captured, 14 on a computed step, 11 on a reused step
  a reused step executes:
    reused_step(cached_model_blocks_0_0, cached_model_blocks_2_0, timestep, text):
        mul = aten.mul.Tensor(timestep, 0.01)
        cos = aten.cos.default(mul)
        sin = aten.sin.default(mul)
        stack = aten.stack.default([cos, sin], -1)
        model_time_linear = model.time.linear(stack)
        model_text_in = model.text_in(text)
        mean = aten.mean.dim(model_text_in, [1])
        add = aten.add.Tensor(model_time_linear, mean)
        model_blocks_1 = model.blocks.1(cached_model_blocks_0_0, add)
        model_head = model.head(cached_model_blocks_2_0)
        mul_1 = aten.mul.Tensor(model_head, 1.0)
        return (mul_1,)
"""


@pytest.mark.parametrize(
    ("strategy", "options", "tensors"),
    [
        ("deepcache", {}, 1),
        ("teacache", {}, 1),
        ("taylorcache", {"max_order": 1}, 2),
        ("teacache", {"rel_l1_thresh": 0.2}, 1),
    ],
)
def test_explain_has_the_figures_of_the_report(
    strategy: str, options: dict[str, Any], tensors: int
) -> None:
    cached = cached_toy(strategy, **options)
    sample(cached)
    (graph,), report = cached.explain().graphs, cached.cache_report()
    (run,) = graph.runs
    assert run.blocks == tuple(f"blocks.{i}" for i in range(DEPTH))
    assert [list(spec.shape) for _, spec in run.held] == [[1, TOKENS, DIM]] * tensors
    assert run.nbytes == report.bytes_held
    assert (graph.nodes, graph.nodes_reused) == (
        report.captures[0].nodes,
        report.captures[0].nodes_reused,
    )
    assert len(re.findall(r"^ +\w+ = ", graph.reused, re.M)) == graph.nodes_reused
    assert not re.search(r"model\.blocks\.\d\(", graph.reused)
    assert graph.graphs == ""


def test_explain_of_a_rule_shows_what_runs_before_its_decision() -> None:
    cached = cached_toy("teacache", rel_l1_thresh=0.2)
    sample(cached, 2)
    text = str(cached.explain())
    assert "its rule on the first block's modulated input decides so (measured against 0.2)" in text
    assert "before_the_decision(x, timestep, text):" in text
    assert "holds model_blocks_2 of blocks.2, less model_embed: " in text


def test_explain_in_full_has_every_graph() -> None:
    cached = cached_toy()
    sample(cached, 1)
    text = str(cached.explain(full=True))
    for name in ("captured", "after_the_passes", "computed_step", "run_0_compute", "run_0_reuse"):
        assert f" {name}(" in text, name
    assert "model_blocks_1 = model.blocks.1(model_blocks_0, add)  # float32[1, 6, 8]" in text


def test_explain_names_what_was_read_from_data() -> None:
    cached = dit_cache_fx.apply(make(MaskedDiT), DeepCache(no_cache_steps=[0]))
    sample(cached, 1, mask=torch.tensor([[1, 1, 0, 1]]))
    (graph,) = cached.explain().graphs
    assert graph.data_guards == ("count of true values of mask: [3]",)
    assert "data guards (other values lead to another graph):" in str(graph)


def test_explain_of_a_schedule_that_depends_on_the_number_of_steps() -> None:
    cached = dit_cache_fx.apply(make(ToyDiT), "deepcache", compute_ratio=0.5)
    assert "on those of compute_ratio 0.5 once the number" in cached.explain().decides
    cached = dit_cache_fx.apply(make(ToyDiT), "deepcache", compute_ratio=0.5, num_steps=4)
    sample(cached)
    computed = [r.step for r in cached.cache_report().timeline if r.action == "computed"]
    expected = f"on those of compute_ratio 0.5: {ranges(computed)} ({len(computed)} in all)"
    assert expected in cached.explain().decides


def test_explain_of_a_disabled_cache_says_so() -> None:
    cached = cached_toy()
    cached.disable()
    assert str(cached.explain()).startswith("deepcache (disabled): ")


def test_explain_and_plot_of_a_backend(tmp_path: Path) -> None:
    cache = dit_cache_fx.backend("taylorcache", no_cache_steps=[0], inner="eager")
    model = torch.compile(make(ToyDiT), backend=cache)
    assert "call the model once" in str(cache.explain())
    sample(model, 3)
    (graph,) = cache.explain().graphs
    assert graph.block_lists == {"blocks": DEPTH}
    assert graph.timestep == "argument 'timestep'"
    assert sum(run.nbytes for run in graph.runs) == cache.cache_report().bytes_held
    assert "tanh" not in graph.reused  # which the blocks do
    assert "tanh" in str(cache.explain(full=True))
    cache.plot(tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


# --- the graph as text ---------------------------------------------------------------------------


def test_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges([]) == ""


def test_lines_have_keywords_constants_and_cut_long_values() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    weight = graph.get_attr("weight")
    y = graph.call_function(torch.add, (x, weight), {"alpha": 2})
    graph.output((graph.call_function(torch.reshape, (y, list(range(100)))),))
    root = nn.Module()
    root.weight = nn.Parameter(torch.ones(2))
    text = list(lines(torch.fx.GraphModule(root, graph), "f"))
    assert text[:3] == ["f(x):", "    weight = weight", "    add = add(x, weight, alpha=2)"]
    assert text[3].endswith("...)")
    assert len(text[3]) < 130


# --- plot --------------------------------------------------------------------------------------


def colours(axes: Any) -> list[list[float]]:
    """What a step map shows: rows are blocks, columns steps."""
    (mesh,) = axes.collections
    return mesh.get_array().tolist()  # type: ignore[no-any-return]


def test_plot_draws_what_each_block_did(tmp_path: Path) -> None:
    cached = cached_toy("taylorcache", max_order=0, no_cache_block_id={"blocks": {1}})
    sample(cached)
    figure = cached.plot(tmp_path / "steps.svg")
    assert "<svg" in (tmp_path / "steps.svg").read_text()
    (axes,) = figure.axes
    computed, predicted = ACTIONS.index("computed"), ACTIONS.index("predicted")
    row = [computed, predicted, computed, predicted]
    assert colours(axes) == [row, [ACTIONS.index("never cached")] * 4, row]
    assert axes.get_title(loc="left") == "2 of 4 steps computed"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["blocks.0", "1", "2"]
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["computed", "predicted", "never cached"]


def test_plot_has_a_map_for_each_branch_that_did_otherwise() -> None:
    cached = cached_toy()
    with torch.no_grad():
        for step in range(4):
            for name in ("cond", "uncond") if step < 3 else ("cond",):
                with cached.cache_context(name):
                    cached(**toy_inputs(1000.0 - step, seed=step))
    titles = [axes.get_title(loc="left") for axes in cached.plot().axes]
    assert titles == ["'cond': 2 of 4 steps computed", "'uncond': 2 of 3 steps computed"]
    report = cached.cache_report()
    uncond = branches(report.timeline)[(1, "uncond", 0)]
    assert step_map(report, uncond, 4)[0] == [0, 1, 0, -1]  # not called on the last step


def test_plot_draws_branches_that_did_the_same_once() -> None:
    cached = cached_toy()
    with torch.no_grad():
        for step in range(3):
            for prompt in (0, 1):
                cached(**toy_inputs(1000.0 - step, prompt=prompt))
    titles = [axes.get_title(loc="left") for axes in cached.plot().axes]
    assert titles == ["branch 0, branch 1: 2 of 3 steps computed"]


def test_plot_of_a_call_of_another_size_on_each_step() -> None:
    cached, text = cached_toy(), torch.randn(1, 4, DIM)
    with torch.no_grad():
        for step in range(9):
            cached(torch.randn(1, 1 + step, DIM), torch.tensor([1000.0 - step]), text)
    titles = [axes.get_title(loc="left") for axes in cached.plot().axes]
    assert titles == [f"branch 0 of graph {1 + i}: 1 of 1 steps computed" for i in range(8)]


def test_plot_of_a_rule_has_the_sum_against_its_threshold() -> None:
    cached = cached_toy("teacache", rel_l1_thresh=0.5)
    sample(cached, 8)
    records = cached.cache_report().timeline
    _, axes = cached.plot().axes
    assert [bar.get_height() for bar in axes.patches] == [r.measured for r in records]
    assert [list(line.get_ydata()) for line in axes.lines] == [[0.5, 0.5]]
    assert "threshold 0.5" in axes.get_title(loc="left")


def test_plot_uses_no_global_state_of_matplotlib() -> None:
    cached = cached_toy()
    sample(cached, 2)
    before = sys.modules.get("matplotlib.pyplot")
    cached.plot()
    assert sys.modules.get("matplotlib.pyplot") is before
    if before is not None:
        assert before.get_fignums() == []


def test_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    cached = cached_toy()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'dit_cache_fx\[plot\]'"):
        cached.plot()


def test_plot_before_the_first_call() -> None:
    with pytest.raises(DitCacheError, match="call the cached model first"):
        cached_toy().plot()


# --- what is noted of a step ---------------------------------------------------------------------


def test_every_computed_step_says_why() -> None:
    cached = cached_toy("teacache", rel_l1_thresh=1.5, no_cache_steps={1})
    sample(cached, 8)
    records = cached.cache_report().timeline
    assert [r.why for r in records[:2]] == ["the first step", "scheduled"]
    assert {r.why for r in records[2:] if r.action == "computed"} == {"its rule"}
    assert {r.why for r in records if r.action == "reused"} == {""}


def test_a_step_without_held_tensors_says_so() -> None:
    cached = cached_toy()
    sample(cached, 2)
    with torch.no_grad(), cached.cache_context("late"):
        cached(**toy_inputs(950.0))
    assert cached.cache_report().timeline[-1].why == "nothing is held"


def test_what_the_rule_measured_is_the_sum_that_it_compared() -> None:
    """Added up by hand from the changes that the rule has seen."""
    changes: list[float] = []

    @dataclass(frozen=True, kw_only=True)
    class Watched(TeaCache):
        def should_compute(self, signal: Tensor, state: Any, forced: Tensor) -> Any:
            change = (signal - state[0]).abs().mean() / state[0].abs().mean()
            changes.append(change.item())
            return super().should_compute(signal, state, forced)

    cached = cached_toy(Watched(rel_l1_thresh=1.5))
    sample(cached, 10)
    records = cached.cache_report().timeline
    total = 0.0
    for record, change in zip(records[1:], changes, strict=True):
        total += change
        assert record.measured == pytest.approx(total)
        assert (record.action == "computed") == (total >= 1.5)
        total = 0.0 if record.action == "computed" else total
    assert {r.action for r in records} == {"computed", "reused"}


def test_noting_a_step_reads_nothing_from_a_device() -> None:
    """A tensor without values stands for one on a device: reading it raises."""

    class OnDevice(TeaCache):
        def metric(self, state: Any, measured: Any = None) -> Tensor:
            return torch.empty((), device="meta")

    cached = cached_toy(OnDevice(rel_l1_thresh=0.5))
    sample(cached)
    with pytest.raises(RuntimeError):
        cached.cache_report()


def test_clearing_states_keeps_what_was_noted() -> None:
    cached = cached_toy("teacache", rel_l1_thresh=0.5)
    sample(cached, 3)
    before = cached.cache_report().timeline
    cached.clear_states()
    assert cached.cache_report().timeline == before
    cached.reset_states()
    assert cached.cache_report().timeline == ()


# --- the logs ------------------------------------------------------------------------------------


def test_logs_say_why_a_call_is_captured(caplog: pytest.LogCaptureFixture) -> None:
    model = make(ReadingDiT, question=lambda text: 1.0 if text.any().item() else 2.0)
    cached = dit_cache_fx.apply(model, DeepCache(no_cache_steps=[0]))
    with caplog.at_level(logging.INFO, logger="dit_cache_fx"), torch.no_grad():
        cached(**toy_inputs(900.0))
        cached(**toy_inputs(900.0, size=1))
        cached(**toy_inputs(900.0) | {"text": torch.zeros(1, 4, DIM)})
        cached.clear_states()
        model.gain = 2.0
        cached(**toy_inputs(900.0))
    text = caplog.text
    assert "capturing: the first call" in text
    assert (
        "capturing: another signature: x is torch.float32[1, 8, 8] on cpu, was "
        "torch.float32[1, 6, 8] on cpu" in text
    )
    assert re.search(
        r"a graph is not valid for this call: it reads \S+ of text: .* \(captured with", text
    )
    assert "capturing: none of the 1 graphs for such inputs fits this call" in text
    assert "the model has changed since the capture: gain of the model: 1.0 -> 2.0" in text


def test_logs_say_what_each_step_did(caplog: pytest.LogCaptureFixture) -> None:
    cached = cached_toy()
    with caplog.at_level(logging.DEBUG, logger="dit_cache_fx"):
        sample(cached, 2)
    assert "step 0 (timestep 1000, branch 0): computed (the first step)" in caplog.text
    assert "step 1 (timestep 950, branch 0): reused" in caplog.text


SCRIPT = """
import torch
from torch import nn
import dit_cache_fx

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
    def forward(self, x, t):
        return x + self.linear(x) * t

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
    def forward(self, x, timestep):
        h = x * 2
        for block in self.blocks:
            h = block(h, timestep[:, None])
        return h.sin()

cached = dit_cache_fx.apply(Model().eval(), "deepcache", no_cache_steps=[0])
compiled = torch.compile(cached, fullgraph=True, backend="eager")
with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
    for step in range(3):
        compiled(torch.ones(1, 4), torch.full((1,), 9.0 - step))
assert not torch._dynamo.utils.counters["graph_break"]
assert [r.action for r in cached.cache_report().timeline] == ["computed", "reused", "reused"]
"""


def run_script(**environment: str) -> str:
    """What SCRIPT, in a process of its own, prints to stderr."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TORCH")}
    inherited |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=inherited | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    return result.stderr


def test_torch_logs_and_torch_trace_show_it_in_compiled_mode(tmp_path: Path) -> None:
    text = run_script(TORCH_LOGS="+dit_cache_fx", TORCH_TRACE=str(tmp_path))
    assert (
        "captured graph 1 for x[1, 4], timestep[1]: block lists blocks (2), timestep 'timestep'"
        in text
    )
    for step, action in enumerate(["computed (the first step)", "reused", "reused"]):
        assert f"step {step} (timestep {9 - step}, branch 0): {action}" in text
    assert "guard_runs: " in text
    (trace,) = tmp_path.glob("*.log")
    found = artifacts(trace)
    names = ["captured", "after_guard_runs", "after_dead_code", "compute", "reuse", "one_graph"]
    assert {f"dit_cache_fx_{name}" for name in names} <= found.keys()
    assert "model.blocks.1(" in found["dit_cache_fx_captured"]
    assert "model.blocks.1(" in found["dit_cache_fx_compute"]
    assert "model.blocks" not in found["dit_cache_fx_reuse"].replace("cached_model_blocks", "")
    assert "cache_or_compute(" in found["dit_cache_fx_after_dead_code"]
    assert "cond(" in found["dit_cache_fx_one_graph"]
    read_by_tlparse(trace, tmp_path / "out", set(found))


def artifacts(trace: Path) -> dict[str, str]:
    """This package's artifacts in a structured trace: a header line, then indented payload."""
    found: dict[str, str] = {}
    name = ""
    for line in trace.read_text().splitlines():
        if not line.startswith("\t"):
            record = json.loads(line[line.index("] {") + 2 :])
            name = record.get("artifact", {}).get("name", "")
        elif name.startswith("dit_cache_fx_"):
            found[name] = found.get(name, "") + line[1:] + "\n"
    return found


def read_by_tlparse(trace: Path, out: Path, names: set[str]) -> None:
    """The same files come out of the real tool, where it is installed."""
    tool = shutil.which("tlparse", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if tool is None:
        return
    subprocess.run([tool, str(trace), "-o", str(out), "--no-browser"], check=True)
    written = {re.sub(r"_\d+$", "", path.stem) for path in out.rglob("dit_cache_fx_*")}
    assert written == names


def test_nothing_is_printed_unless_asked_for() -> None:
    assert "dit_cache_fx" not in run_script()
