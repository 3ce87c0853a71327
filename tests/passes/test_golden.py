"""Golden graphs: what each pass makes of the toy, and where it must not fire.

`EXPECTTEST_ACCEPT=1 python -m pytest tests/passes/test_golden.py` writes the graphs anew.
"""

from __future__ import annotations

import pytest
import torch
from expecttest import TestCase
from torch import nn

from dit_cache_fx.strategies import DeepCache, Strategy, TaylorCache, TeaCache
from tests.passes.toy import Block, Toy, captured, code, inputs, passed

DEEP = DeepCache(no_cache_steps=[0])


class Golden(TestCase):
    def test_captured(self) -> None:
        self.assertExpectedInline(
            code(captured(DEEP).gm),
            """\
def forward(self, x, timestep, text):
    model = self.model
    model_blocks = model.blocks
    unsqueeze = torch.ops.aten.unsqueeze.default(timestep, 1)
    model_time_embedder = model.time_embedder(unsqueeze)
    unsqueeze_1 = torch.ops.aten.unsqueeze.default(model_time_embedder, 1)
    model_x_embedder = model.x_embedder(x)
    model_positions = model.positions
    add = torch.ops.aten.add.Tensor(model_x_embedder, model_positions)
    model_text_embedder = model.text_embedder(text)
    model_blocks_0 = getattr(model_blocks, "0")(add, model_text_embedder, unsqueeze_1)
    getitem = model_blocks_0[0]
    getitem_1 = model_blocks_0[1]
    model_blocks_1 = getattr(model_blocks, "1")(getitem, getitem_1, unsqueeze_1)
    getitem_2 = model_blocks_1[0]
    getitem_3 = model_blocks_1[1]
    model_blocks_2 = getattr(model_blocks, "2")(getitem_2, getitem_3, unsqueeze_1)
    getitem_4 = model_blocks_2[0]
    getitem_5 = model_blocks_2[1]
    cat = torch.ops.aten.cat.default([getitem_4, getitem_5], 1)
    slice_1 = torch.ops.aten.slice.Tensor(cat, 1, 0, 16)
    add_1 = torch.ops.aten.add.Tensor(slice_1, unsqueeze_1)
    model_proj_out = model.proj_out(add_1)
    return [model_proj_out]
""",
        )

    def test_forward_slices(self) -> None:
        self.assertExpectedInline(
            code(passed(DEEP, "forward_slices").gm),
            """\
def forward(self, x, timestep, text):
    model = self.model
    model_blocks = model.blocks
    unsqueeze = torch.ops.aten.unsqueeze.default(timestep, 1)
    model_time_embedder = model.time_embedder(unsqueeze)
    unsqueeze_1 = torch.ops.aten.unsqueeze.default(model_time_embedder, 1)
    model_x_embedder = model.x_embedder(x)
    model_positions = model.positions
    add = torch.ops.aten.add.Tensor(model_x_embedder, model_positions)
    model_text_embedder = model.text_embedder(text)
    model_blocks_0 = getattr(model_blocks, "0")(add, model_text_embedder, unsqueeze_1)
    getitem = model_blocks_0[0]
    getitem_1 = model_blocks_0[1]
    model_blocks_1 = getattr(model_blocks, "1")(getitem, getitem_1, unsqueeze_1)
    getitem_2 = model_blocks_1[0]
    getitem_3 = model_blocks_1[1]
    model_blocks_2 = getattr(model_blocks, "2")(getitem_2, getitem_3, unsqueeze_1)
    getitem_4 = model_blocks_2[0]
    add_1 = torch.ops.aten.add.Tensor(getitem_4, unsqueeze_1)
    model_proj_out = model.proj_out(add_1)
    return [model_proj_out]
""",
        )

    def test_fold_constants(self) -> None:
        self.assertExpectedInline(
            code(passed(DEEP, "fold_constants", _Sinusoidal()).gm),
            """\
def forward(self, x, timestep, text):
    model = self.model
    model_blocks = model.blocks
    _to_copy_1 = self.constant__to_copy_1
    unsqueeze = torch.ops.aten.unsqueeze.default(timestep, 1)
    unsqueeze_1 = torch.ops.aten.unsqueeze.default(_to_copy_1, 0)
    mul_1 = torch.ops.aten.mul.Tensor(unsqueeze, unsqueeze_1)
    sum_1 = torch.ops.aten.sum.dim_IntList(mul_1, [1])
    unsqueeze_2 = torch.ops.aten.unsqueeze.default(sum_1, 1)
    model_time_embedder = model.time_embedder(unsqueeze_2)
    unsqueeze_3 = torch.ops.aten.unsqueeze.default(model_time_embedder, 1)
    model_x_embedder = model.x_embedder(x)
    model_positions = model.positions
    add = torch.ops.aten.add.Tensor(model_x_embedder, model_positions)
    model_text_embedder = model.text_embedder(text)
    model_blocks_0 = getattr(model_blocks, "0")(add, model_text_embedder, unsqueeze_3)
    getitem = model_blocks_0[0]
    getitem_1 = model_blocks_0[1]
    model_blocks_1 = getattr(model_blocks, "1")(getitem, getitem_1, unsqueeze_3)
    getitem_2 = model_blocks_1[0]
    getitem_3 = model_blocks_1[1]
    model_blocks_2 = getattr(model_blocks, "2")(getitem_2, getitem_3, unsqueeze_3)
    getitem_4 = model_blocks_2[0]
    add_1 = torch.ops.aten.add.Tensor(getitem_4, unsqueeze_3)
    model_proj_out = model.proj_out(add_1)
    return [model_proj_out]
""",
        )

    def test_select_runs(self) -> None:
        strategy = DeepCache(no_cache_steps=[0], no_cache_block_id={"blocks": {1}})
        regions = passed(strategy, "select_runs").regions
        self.assertExpectedInline(
            "\n".join(map(str, regions)),
            """\
run 0: blocks.0 -> ?
run 1: blocks.2 -> ?""",
        )

    def test_find_values(self) -> None:
        self.assertExpectedInline(
            "\n".join(map(str, passed(DEEP, "find_values").regions)),
            """run 0: blocks.0 blocks.1 blocks.2 -> getitem_4""",
        )

    def test_find_values_with_starts(self) -> None:
        tea = TeaCache(no_cache_steps=[0])
        self.assertExpectedInline(
            "\n".join(map(str, passed(tea, "find_values").regions)),
            """run 0: blocks.0 blocks.1 blocks.2 -> getitem_4 (from add)""",
        )

    def test_guard_runs(self) -> None:
        program = passed(DEEP, "guard_runs")
        self.assertExpectedInline(
            code(program.gm),
            """\
def forward(self, x, timestep, text):
    model = self.model
    unsqueeze = torch.ops.aten.unsqueeze.default(timestep, 1)
    model_time_embedder = model.time_embedder(unsqueeze)
    unsqueeze_1 = torch.ops.aten.unsqueeze.default(model_time_embedder, 1)
    model_x_embedder = model.x_embedder(x)
    model_positions = model.positions
    add = torch.ops.aten.add.Tensor(model_x_embedder, model_positions)
    model_text_embedder = model.text_embedder(text)
    run_0_compute = self.run_0_compute
    run_0_reuse = self.run_0_reuse
    run_0 = dit_cache_fx_ir_cached_run_cache_or_compute(0, run_0_compute, run_0_reuse, [], [unsqueeze_1, add, model_text_embedder])
    getitem_4 = run_0[0]
    add_1 = torch.ops.aten.add.Tensor(getitem_4, unsqueeze_1)
    model_proj_out = model.proj_out(add_1)
    return [model_proj_out]
""",
        )
        self.assertExpectedInline(
            code(program.gm.run_0_compute),
            """\
def forward(self, cached_getitem_4_0, distance, computed, gap, reach, way, unsqueeze_1, add, model_text_embedder):
    model_blocks = self.model.blocks
    model_blocks_0 = getattr(model_blocks, "0")(add, model_text_embedder, unsqueeze_1)
    getitem = model_blocks_0[0]
    getitem_1 = model_blocks_0[1]
    model_blocks_1 = getattr(model_blocks, "1")(getitem, getitem_1, unsqueeze_1)
    getitem_2 = model_blocks_1[0]
    getitem_3 = model_blocks_1[1]
    model_blocks_2 = getattr(model_blocks, "2")(getitem_2, getitem_3, unsqueeze_1)
    getitem_4 = model_blocks_2[0]
    return (getitem_4, getitem_4)
""",
        )
        self.assertExpectedInline(
            code(program.gm.run_0_reuse),
            """\
def forward(self, cached_getitem_4_0, distance, computed, gap, reach, way):
    return (cached_getitem_4_0,)
""",
        )

    def test_sink(self) -> None:
        program = passed(DEEP, "sink")
        self.assertExpectedInline(
            code(program.gm),
            """\
def forward(self, x, timestep, text):
    model = self.model
    unsqueeze = torch.ops.aten.unsqueeze.default(timestep, 1)
    model_time_embedder = model.time_embedder(unsqueeze)
    unsqueeze_1 = torch.ops.aten.unsqueeze.default(model_time_embedder, 1)
    run_0_compute = self.run_0_compute
    run_0_reuse = self.run_0_reuse
    run_0 = dit_cache_fx_ir_cached_run_cache_or_compute(0, run_0_compute, run_0_reuse, [], [x, text, unsqueeze_1])
    getitem_4 = run_0[0]
    add_1 = torch.ops.aten.add.Tensor(getitem_4, unsqueeze_1)
    model_proj_out = model.proj_out(add_1)
    return [model_proj_out]
""",
        )
        self.assertExpectedInline(
            code(program.gm.run_0_compute),
            """\
def forward(self, cached_getitem_4_0, distance, computed, gap, reach, way, x, text, unsqueeze_1):
    model = self.model
    model_blocks = model.blocks
    model_x_embedder = model.x_embedder(x)
    model_positions = model.positions
    add = torch.ops.aten.add.Tensor(model_x_embedder, model_positions)
    model_text_embedder = model.text_embedder(text)
    model_blocks_0 = getattr(model_blocks, "0")(add, model_text_embedder, unsqueeze_1)
    getitem = model_blocks_0[0]
    getitem_1 = model_blocks_0[1]
    model_blocks_1 = getattr(model_blocks, "1")(getitem, getitem_1, unsqueeze_1)
    getitem_2 = model_blocks_1[0]
    getitem_3 = model_blocks_1[1]
    model_blocks_2 = getattr(model_blocks, "2")(getitem_2, getitem_3, unsqueeze_1)
    getitem_4 = model_blocks_2[0]
    return (getitem_4, getitem_4)
""",
        )

    def test_teacache(self) -> None:
        program = passed(TeaCache(no_cache_steps=[0]), "dead_code")
        self.assertExpectedInline(
            code(program.gm),
            """\
def forward(self, x, timestep, text):
    model = self.model
    unsqueeze = torch.ops.aten.unsqueeze.default(timestep, 1)
    model_time_embedder = model.time_embedder(unsqueeze)
    unsqueeze_1 = torch.ops.aten.unsqueeze.default(model_time_embedder, 1)
    model_x_embedder = model.x_embedder(x)
    model_positions = model.positions
    add = torch.ops.aten.add.Tensor(model_x_embedder, model_positions)
    run_0_compute = self.run_0_compute
    run_0_reuse = self.run_0_reuse
    run_0 = dit_cache_fx_ir_cached_run_cache_or_compute(0, run_0_compute, run_0_reuse, [add], [text, unsqueeze_1])
    getitem_4 = run_0[0]
    add_1 = torch.ops.aten.add.Tensor(getitem_4, unsqueeze_1)
    model_proj_out = model.proj_out(add_1)
    return [model_proj_out]
""",
        )
        self.assertExpectedInline(
            code(program.gm.run_0_reuse),
            """\
def forward(self, cached_getitem_4_0, distance, computed, gap, reach, way, add):
    add_1 = torch.ops.aten.add.Tensor(add, cached_getitem_4_0)
    return (add_1,)
""",
        )

    def test_teacache_rule(self) -> None:
        program = passed(TeaCache(rel_l1_thresh=0.1, signal="input"), "dead_code")
        self.assertExpectedInline(
            code(program.gm),
            """\
def forward(self, x, timestep, text):
    model = self.model
    unsqueeze = torch.ops.aten.unsqueeze.default(timestep, 1)
    model_time_embedder = model.time_embedder(unsqueeze)
    unsqueeze_1 = torch.ops.aten.unsqueeze.default(model_time_embedder, 1)
    model_x_embedder = model.x_embedder(x)
    model_positions = model.positions
    add = torch.ops.aten.add.Tensor(model_x_embedder, model_positions)
    run_0_compute = self.run_0_compute
    run_0_reuse = self.run_0_reuse
    run_0 = dit_cache_fx_ir_cached_run_cache_or_compute(0, run_0_compute, run_0_reuse, [add], [text, unsqueeze_1])
    getitem_4 = run_0[0]
    add_1 = torch.ops.aten.add.Tensor(getitem_4, unsqueeze_1)
    model_proj_out = model.proj_out(add_1)
    return [model_proj_out]
""",
        )

    def test_taylorcache_reuse(self) -> None:
        program = passed(TaylorCache(no_cache_steps=[0], max_order=1), "dead_code")
        self.assertExpectedInline(
            code(program.gm.run_0_reuse),
            """\
def forward(self, cached_getitem_4_0, cached_getitem_4_1, distance, computed, gap, reach, way):
    pow_1 = torch.ops.aten.pow.Tensor_Scalar(distance, 1)
    div = torch.ops.aten.div.Tensor(pow_1, 1)
    mul = torch.ops.aten.mul.Tensor(cached_getitem_4_1, div)
    add = torch.ops.aten.add.Tensor(cached_getitem_4_0, mul)
    return (add,)
""",
        )

    def test_dead_code(self) -> None:
        program = passed(DEEP, "dead_code", _EndsWithBlocks())
        self.assertExpectedInline(
            code(program.gm),
            """\
def forward(self, x, timestep, text):
    run_0_compute = self.run_0_compute
    run_0_reuse = self.run_0_reuse
    run_0 = dit_cache_fx_ir_cached_run_cache_or_compute(0, run_0_compute, run_0_reuse, [], [x, timestep, text])
    getitem_4 = run_0[0]
    return [getitem_4]
""",
        )


class _Sinusoidal(Toy):
    """Embeds the timestep in two frequencies."""

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        frequencies = torch.exp(torch.arange(2.0) * -9.2).to(torch.float64).to(x.dtype)
        angles = timestep[:, None] * frequencies[None]
        return super().forward(x, angles.sum(1), text)


class _EndsWithBlocks(Toy):
    """Returns the last block's own result: the caller must not get the held tensor."""

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        temb = self.time_embedder(timestep[:, None])[:, None]
        img = self.x_embedder(x)
        txt = self.text_embedder(text)
        for block in self.blocks:
            img, txt = block(img, txt, temb)
        return img


class _LastPart(Toy):
    """Takes the second part of a joined sequence, and a piece of the first."""

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        temb = self.time_embedder(timestep[:, None])[:, None]
        img, txt = self.x_embedder(x), self.text_embedder(text)
        for block in self.blocks:
            img, txt = block(img, txt, temb)
        joined = torch.cat([img, txt], dim=1)
        return self.proj_out(joined[:, 16:].mean(1, keepdim=True) + joined[:, :15])


def test_forward_slices_takes_whole_parts_only() -> None:
    after = passed(DEEP, "forward_slices", _LastPart())
    (piece,) = [n for n in after.graph.nodes if n.target is torch.ops.aten.slice.Tensor]
    assert piece.args[1:] == (1, 0, 15)


class _EveryOther(Toy):
    """Takes every other row of the first part of a joined sequence."""

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        temb = self.time_embedder(timestep[:, None])[:, None]
        img, txt = self.x_embedder(x), self.text_embedder(text)
        for block in self.blocks:
            img, txt = block(img, txt, temb)
        return self.proj_out(torch.cat([img, txt], dim=1)[:, :16:2])


def test_forward_slices_leaves_every_other_row() -> None:
    after = passed(DEEP, "forward_slices", _EveryOther())
    (rows,) = [n for n in after.graph.nodes if n.target is torch.ops.aten.slice.Tensor]
    assert rows.args[1:] == (1, 0, 16, 2)


class _Masked(Toy):
    """The text, of a length that depends on its values, is in front of the image."""

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        temb = self.time_embedder(timestep[:, None])[:, None]
        img, txt = self.x_embedder(x), self.text_embedder(text)
        for block in self.blocks:
            img, txt = block(img, txt, temb)
        some = txt[:, text[0, :, 0] > 0]
        joined = torch.cat([some, img], dim=1)
        return self.proj_out(joined[:, some.shape[1] :])


def test_forward_slices_leaves_a_part_whose_place_depends_on_data() -> None:
    after = passed(DEEP, "forward_slices", _Masked())
    assert [n for n in after.graph.nodes if n.target is torch.ops.aten.slice.Tensor]


@pytest.mark.parametrize("ids", [{0, 1, 2}, range(3)])
def test_no_run_where_every_block_always_runs(ids: set[int]) -> None:
    strategy = DeepCache(no_cache_steps=[0], no_cache_block_id={"blocks": ids})
    program = passed(strategy, "dead_code")
    assert program.regions == ()
    assert len(program.block_calls()) == 3
    assert "cache_or_compute" not in code(program.gm)


def test_sink_leaves_what_a_reused_step_reads() -> None:
    program = passed(TeaCache(no_cache_steps=[0]), "sink")
    top = {n.target for n in program.graph.nodes if n.op == "call_module"}
    assert top == {"model.x_embedder", "model.time_embedder", "model.proj_out"}


def test_sink_leaves_what_a_block_that_always_runs_reads() -> None:
    strategy = DeepCache(no_cache_steps=[0], no_cache_block_id={"blocks": {0}})
    program = passed(strategy, "sink")
    top = {n.target for n in program.graph.nodes if n.op == "call_module"}
    assert "model.text_embedder" in top


def test_dead_code_keeps_a_block_that_always_runs() -> None:
    strategy = DeepCache(no_cache_steps=[0], no_cache_block_id={"blocks": {1}})
    program = passed(strategy, "dead_code")
    assert [str(n.target) for n in program.block_calls()] == ["model.blocks.1"]


def test_values_between_cached_blocks_are_not_held() -> None:
    program = passed(DEEP, "find_values", Toy(num_blocks=6))
    assert [len(region.values) for region in program.regions] == [1]


class _Skips(Toy):
    """The last block reads the first one's result; so does the final layer."""

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        temb = self.time_embedder(timestep[:, None])[:, None]
        img, txt = self.x_embedder(x), self.text_embedder(text)
        first, txt = self.blocks[0](img, txt, temb)
        img, txt = self.blocks[1](first, txt, temb)
        img, txt = self.blocks[2](img + first, txt, temb)
        return self.proj_out(img + first)


@pytest.mark.parametrize(
    "strategy",
    [DEEP, TeaCache(no_cache_steps=[0]), TaylorCache(no_cache_steps=[0])],
    ids=lambda s: s.name,
)
def test_a_value_read_behind_the_run_is_held(strategy: Strategy) -> None:
    program = passed(strategy, "find_values", _Skips())
    assert [len(region.values) for region in program.regions] == [2]
    passed(strategy, "dead_code", _Skips())


def test_a_slice_of_a_joined_stream_starts_from_its_part() -> None:
    program = passed(TeaCache(no_cache_steps=[0]), "find_values", _Joined())
    (region,) = program.regions
    assert region.run_inputs == ("model_x_embedder",)
    (value,) = region.values
    assert program.node(value).target is torch.ops.aten.slice.Tensor


class _Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        return x + self.layer(x + temb)


class _Joined(Toy):
    """Double blocks, then single blocks on the joined sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.single_blocks = nn.ModuleList(_Single() for _ in range(2))

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        temb = self.time_embedder(timestep[:, None])[:, None]
        img, txt = self.x_embedder(x), self.text_embedder(text)
        for block in self.blocks:
            img, txt = block(img, txt, temb)
        joined = torch.cat([img, txt], dim=1)
        for single in self.single_blocks:
            joined = single(joined, temb)
        return self.proj_out(joined[:, : x.shape[1]])


def test_the_toy_is_captured_right() -> None:
    torch.manual_seed(0)
    model = Toy().eval()
    program = captured(DEEP, model)
    with torch.no_grad():
        (out,) = program.gm(*inputs().values())
        assert torch.equal(out, model(**inputs()))
