"""Golden graphs: what the lowerings make of the toy, and what they leave out.

`EXPECTTEST_ACCEPT=1 python -m pytest tests/lowering/test_golden.py` writes the graphs anew.
"""

from __future__ import annotations

import pytest
import torch
from expecttest import TestCase
from torch import fx

from dit_cache_fx.lowering.asserts import assertions
from dit_cache_fx.lowering.preamble import pinned, split_preamble
from dit_cache_fx.strategies import DeepCache, TaylorCache, TeaCache
from tests.lowering.toy import (
    ByIndex,
    EndsWithBlocks,
    Masked,
    MaskedBehind,
    Reads,
    guards_of,
    one_graph_of,
    variants_of,
)
from tests.passes.toy import Toy, code, inputs

DEEP = DeepCache(no_cache_steps=[0])
TEA = TeaCache(no_cache_steps=[0])
RULE = TeaCache(rel_l1_thresh=0.1, signal="input")
TAYLOR = TaylorCache(no_cache_steps=[0], max_order=1)


class Variants(TestCase):
    def test_compute(self) -> None:
        self.assertExpectedInline(
            code(variants_of(DEEP).compute.gm),
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
    return (model_proj_out, getitem_4)
""",
        )

    def test_reuse(self) -> None:
        self.assertExpectedInline(
            code(variants_of(DEEP).reuse.gm),
            """\
def forward(self, cached_getitem_4_0, timestep):
    model = self.model
    unsqueeze = torch.ops.aten.unsqueeze.default(timestep, 1)
    model_time_embedder = model.time_embedder(unsqueeze)
    unsqueeze_1 = torch.ops.aten.unsqueeze.default(model_time_embedder, 1)
    add_1 = torch.ops.aten.add.Tensor(cached_getitem_4_0, unsqueeze_1)
    model_proj_out = model.proj_out(add_1)
    return (model_proj_out,)
""",
        )

    def test_reuse_of_teacache_keeps_the_runs_start(self) -> None:
        self.assertExpectedInline(
            code(variants_of(TEA).reuse.gm),
            """\
def forward(self, cached_getitem_4_0, x, timestep):
    model = self.model
    unsqueeze = torch.ops.aten.unsqueeze.default(timestep, 1)
    model_time_embedder = model.time_embedder(unsqueeze)
    unsqueeze_1 = torch.ops.aten.unsqueeze.default(model_time_embedder, 1)
    model_x_embedder = model.x_embedder(x)
    model_positions = model.positions
    add = torch.ops.aten.add.Tensor(model_x_embedder, model_positions)
    add_1 = torch.ops.aten.add.Tensor(add, cached_getitem_4_0)
    add_2 = torch.ops.aten.add.Tensor(add_1, unsqueeze_1)
    model_proj_out = model.proj_out(add_2)
    return (model_proj_out,)
""",
        )

    def test_taylorcache(self) -> None:
        variants = variants_of(TAYLOR)
        self.assertExpectedInline(
            code(variants.compute.gm),
            """\
def forward(self, distance, computed, cached_getitem_4_0, cached_getitem_4_1, x, timestep, text):
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
    gt = torch.ops.aten.gt.Scalar(computed, 0)
    gt_1 = torch.ops.aten.gt.Scalar(distance, 0)
    bitwise_and = torch.ops.aten.bitwise_and.Tensor(gt, gt_1)
    sub = torch.ops.aten.sub.Tensor(getitem_4, cached_getitem_4_0)
    scalar_tensor = torch.ops.aten.scalar_tensor.default(inf, dtype = torch.float64, layout = torch.strided, device = device(type='cpu'))
    where = torch.ops.aten.where.self(bitwise_and, distance, scalar_tensor)
    div = torch.ops.aten.div.Tensor(sub, where)
    gt_2 = torch.ops.aten.gt.Scalar(computed, 0)
    eq = torch.ops.aten.eq.Scalar(distance, 0)
    bitwise_and_1 = torch.ops.aten.bitwise_and.Tensor(gt_2, eq)
    where_1 = torch.ops.aten.where.self(bitwise_and_1, cached_getitem_4_1, div)
    add_1 = torch.ops.aten.add.Tensor(getitem_4, unsqueeze_1)
    model_proj_out = model.proj_out(add_1)
    return (model_proj_out, getitem_4, where_1)
""",
        )
        self.assertExpectedInline(
            code(variants.reuse.gm),
            """\
def forward(self, distance, cached_getitem_4_0, cached_getitem_4_1, timestep):
    model = self.model
    unsqueeze = torch.ops.aten.unsqueeze.default(timestep, 1)
    model_time_embedder = model.time_embedder(unsqueeze)
    unsqueeze_1 = torch.ops.aten.unsqueeze.default(model_time_embedder, 1)
    pow_1 = torch.ops.aten.pow.Tensor_Scalar(distance, 1)
    div = torch.ops.aten.div.Tensor(pow_1, 1)
    mul = torch.ops.aten.mul.Tensor(cached_getitem_4_1, div)
    add = torch.ops.aten.add.Tensor(cached_getitem_4_0, mul)
    add_1 = torch.ops.aten.add.Tensor(add, unsqueeze_1)
    model_proj_out = model.proj_out(add_1)
    return (model_proj_out,)
""",
        )

    def test_reuse_where_the_blocks_result_is_the_output(self) -> None:
        self.assertExpectedInline(
            code(variants_of(DEEP, EndsWithBlocks()).reuse.gm),
            """\
def forward(self, cached_getitem_4_0):
    return (cached_getitem_4_0,)
""",
        )

    def test_prefix_of_a_rule(self) -> None:
        variants = variants_of(RULE)
        assert variants.prefix is not None
        self.assertExpectedInline(
            code(variants.prefix.gm),
            """\
def forward(self, x):
    model = self.model
    model_x_embedder = model.x_embedder(x)
    model_positions = model.positions
    add = torch.ops.aten.add.Tensor(model_x_embedder, model_positions)
    return (add, add)
""",
        )
        self.assertExpectedInline(
            code(variants.compute.gm),
            """\
def forward(self, add, timestep, text):
    model = self.model
    model_blocks = model.blocks
    unsqueeze = torch.ops.aten.unsqueeze.default(timestep, 1)
    model_time_embedder = model.time_embedder(unsqueeze)
    unsqueeze_1 = torch.ops.aten.unsqueeze.default(model_time_embedder, 1)
    model_text_embedder = model.text_embedder(text)
    model_blocks_0 = getattr(model_blocks, "0")(add, model_text_embedder, unsqueeze_1)
    getitem = model_blocks_0[0]
    getitem_1 = model_blocks_0[1]
    model_blocks_1 = getattr(model_blocks, "1")(getitem, getitem_1, unsqueeze_1)
    getitem_2 = model_blocks_1[0]
    getitem_3 = model_blocks_1[1]
    model_blocks_2 = getattr(model_blocks, "2")(getitem_2, getitem_3, unsqueeze_1)
    getitem_4 = model_blocks_2[0]
    sub = torch.ops.aten.sub.Tensor(getitem_4, add)
    add_1 = torch.ops.aten.add.Tensor(getitem_4, unsqueeze_1)
    model_proj_out = model.proj_out(add_1)
    return (model_proj_out, sub)
""",
        )
        self.assertExpectedInline(str(variants.carried), """('add',)""")

    def test_blocks_that_always_run_are_in_both(self) -> None:
        strategy = DeepCache(no_cache_steps=[0], no_cache_block_id={"blocks": {1}})
        self.assertExpectedInline(
            code(variants_of(strategy).reuse.gm),
            """\
def forward(self, cached_getitem_0, cached_getitem_1_0, cached_getitem_4_0, timestep):
    model = self.model
    unsqueeze = torch.ops.aten.unsqueeze.default(timestep, 1)
    model_time_embedder = model.time_embedder(unsqueeze)
    unsqueeze_1 = torch.ops.aten.unsqueeze.default(model_time_embedder, 1)
    model_blocks_1 = getattr(model.blocks, "1")(cached_getitem_0, cached_getitem_1_0, unsqueeze_1)
    add_1 = torch.ops.aten.add.Tensor(cached_getitem_4_0, unsqueeze_1)
    model_proj_out = model.proj_out(add_1)
    return (model_proj_out,)
""",
        )


def test_no_prefix_without_a_rule() -> None:
    for strategy in (DEEP, TEA, TAYLOR):
        variants = variants_of(strategy)
        assert variants.prefix is None
        assert variants.carried == ()


def test_variants_are_the_same_where_no_block_is_cached() -> None:
    always = DeepCache(no_cache_steps=[0], no_cache_block_id={"blocks": {0, 1, 2}})
    variants = variants_of(always)
    assert code(variants.compute.gm) == code(variants.reuse.gm)
    assert variants.cached == {}


class OneGraph(TestCase):
    def test_one_graph(self) -> None:
        gm = one_graph_of(DEEP).part.gm
        self.assertExpectedInline(
            code(gm),
            """\
def forward(self, forced, cached_getitem_4_0, x, timestep, text):
    reshape_default = torch.ops.aten.reshape.default(forced, [])
    compute = self.compute
    reuse = self.reuse
    cond = torch.cond(reshape_default, compute, reuse, (cached_getitem_4_0, x, timestep, text))
    getitem = cond[0]
    getitem_1 = cond[1]
    return (getitem, getitem_1)
""",
        )
        self.assertExpectedInline(
            code(_branch(gm, "compute")),
            """\
def forward(self, cached_getitem_4_0, x, timestep, text):
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
    clone_default = torch.ops.aten.clone.default(model_proj_out, memory_format = torch.contiguous_format)
    clone_default_1 = torch.ops.aten.clone.default(getitem_4, memory_format = torch.contiguous_format)
    return (clone_default, clone_default_1)
""",
        )
        self.assertExpectedInline(
            code(_branch(gm, "reuse")),
            """\
def forward(self, cached_getitem_4_0, x, timestep, text):
    model = self.model
    unsqueeze = torch.ops.aten.unsqueeze.default(timestep, 1)
    model_time_embedder = model.time_embedder(unsqueeze)
    unsqueeze_1 = torch.ops.aten.unsqueeze.default(model_time_embedder, 1)
    add_1 = torch.ops.aten.add.Tensor(cached_getitem_4_0, unsqueeze_1)
    model_proj_out = model.proj_out(add_1)
    clone_default = torch.ops.aten.clone.default(model_proj_out, memory_format = torch.contiguous_format)
    empty_memory_format = torch.ops.aten.empty.memory_format([2, 16, 8], dtype = torch.float32, device = device(type='cpu'))
    return (clone_default, empty_memory_format)
""",
        )

    def test_rule(self) -> None:
        gm = one_graph_of(RULE).part.gm
        self.assertExpectedInline(
            code(gm),
            """\
def forward(self, forced, fresh, state_0, state_1, cached_getitem_4_0, x, timestep, text):
    model = self.model
    reshape_default = torch.ops.aten.reshape.default(forced, [])
    reshape_default_1 = torch.ops.aten.reshape.default(fresh, [])
    reshape_default_2 = torch.ops.aten.reshape.default(state_1, [])
    model_x_embedder = model.x_embedder(x)
    model_positions = model.positions
    add = torch.ops.aten.add.Tensor(model_x_embedder, model_positions)
    reshape_default_7 = torch.ops.aten.reshape.default(add, [-1])
    zeros = torch.ops.aten.zeros.default([], dtype = torch.float64, device = device(type='cpu'), pin_memory = False)
    clone = torch.ops.aten.clone.default(zeros)
    sub = torch.ops.aten.sub.Tensor(add, state_0)
    abs_1 = torch.ops.aten.abs.default(sub)
    abs_2 = torch.ops.aten.abs.default(state_0)
    mean = torch.ops.aten.mean.default(abs_1)
    mean_1 = torch.ops.aten.mean.default(abs_2)
    div = torch.ops.aten.div.Tensor(mean, mean_1)
    _to_copy = torch.ops.aten._to_copy.default(div, dtype = torch.float64)
    zeros_like = torch.ops.aten.zeros_like.default(_to_copy, pin_memory = False)
    mul = torch.ops.aten.mul.Tensor(zeros_like, _to_copy)
    add_1 = torch.ops.aten.add.Tensor(mul, 1.0)
    mul_1 = torch.ops.aten.mul.Tensor(add_1, _to_copy)
    add_2 = torch.ops.aten.add.Tensor(mul_1, 0.0)
    add_3 = torch.ops.aten.add.Tensor(reshape_default_2, add_2)
    ge = torch.ops.aten.ge.Scalar(add_3, 0.1)
    bitwise_or = torch.ops.aten.bitwise_or.Tensor(reshape_default, ge)
    scalar_tensor = torch.ops.aten.scalar_tensor.default(0.0, dtype = torch.float64, layout = torch.strided, device = device(type='cpu'))
    where = torch.ops.aten.where.self(bitwise_or, scalar_tensor, add_3)
    view = torch.ops.aten.view.default(bitwise_or, [])
    sum_1 = torch.ops.aten.sum.default(add)
    abs_3 = torch.ops.aten.abs.default(sum_1)
    ne = torch.ops.aten.ne.Scalar(abs_3, inf)
    eq = torch.ops.aten.eq.Tensor(sum_1, sum_1)
    mul_2 = torch.ops.aten.mul.Tensor(eq, ne)
    bitwise_not = torch.ops.aten.bitwise_not.default(mul_2)
    zeros_1 = torch.ops.aten.zeros.default([], dtype = torch.bool, device = device(type='cpu'), pin_memory = False)
    sum_2 = torch.ops.aten.sum.default(add_3)
    abs_4 = torch.ops.aten.abs.default(sum_2)
    ne_1 = torch.ops.aten.ne.Scalar(abs_4, inf)
    eq_1 = torch.ops.aten.eq.Tensor(sum_2, sum_2)
    mul_3 = torch.ops.aten.mul.Tensor(eq_1, ne_1)
    bitwise_not_1 = torch.ops.aten.bitwise_not.default(mul_3)
    bitwise_or_1 = torch.ops.aten.bitwise_or.Tensor(zeros_1, bitwise_not_1)
    sum_3 = torch.ops.aten.sum.default(where)
    isnan = torch.ops.aten.isnan.default(sum_3)
    bitwise_or_2 = torch.ops.aten.bitwise_or.Tensor(bitwise_or_1, isnan)
    bitwise_or_3 = torch.ops.aten.bitwise_or.Tensor(bitwise_not, bitwise_or_2)
    bitwise_or_4 = torch.ops.aten.bitwise_or.Tensor(view, bitwise_or_3)
    bitwise_or_5 = torch.ops.aten.bitwise_or.Tensor(reshape_default_1, bitwise_or_3)
    where_1 = torch.ops.aten.where.self(bitwise_or_5, add, add)
    where_2 = torch.ops.aten.where.self(bitwise_or_5, zeros, where)
    where_3 = torch.ops.aten.where.self(bitwise_or_5, clone, add_3)
    bitwise_or_6 = torch.ops.aten.bitwise_or.Tensor(bitwise_or_4, reshape_default_1)
    stack = torch.ops.aten.stack.default([bitwise_or_6, bitwise_not])
    unbind = torch.ops.aten.unbind.int(stack)
    getitem = unbind[0]
    getitem_1 = unbind[1]
    compute = self.compute
    reuse = self.reuse
    cond = torch.cond(getitem, compute, reuse, (cached_getitem_4_0, timestep, text, reshape_default_7))
    getitem_2 = cond[0]
    getitem_3 = cond[1]
    return (getitem_2, getitem_3, getitem, getitem_1, where_1, where_2, where_3)
""",
        )
        self.assertExpectedInline(
            code(_branch(gm, "reuse")),
            """\
def forward(self, cached_getitem_4_0, timestep, text, add):
    model = self.model
    reshape_default = torch.ops.aten.reshape.default(add, [2, 16, 8])
    unsqueeze = torch.ops.aten.unsqueeze.default(timestep, 1)
    model_time_embedder = model.time_embedder(unsqueeze)
    unsqueeze_1 = torch.ops.aten.unsqueeze.default(model_time_embedder, 1)
    add_1 = torch.ops.aten.add.Tensor(reshape_default, cached_getitem_4_0)
    add_2 = torch.ops.aten.add.Tensor(add_1, unsqueeze_1)
    model_proj_out = model.proj_out(add_2)
    clone_default = torch.ops.aten.clone.default(model_proj_out, memory_format = torch.contiguous_format)
    empty_memory_format = torch.ops.aten.empty.memory_format([2, 16, 8], dtype = torch.float32, device = device(type='cpu'))
    return (clone_default, empty_memory_format)
""",
        )

    def test_carried_state(self) -> None:
        """What is held goes in and, where it stays, out again."""
        gm = one_graph_of(TAYLOR, carry=True).part.gm
        self.assertExpectedInline(
            code(gm),
            """\
def forward(self, forced, distance, computed, cached_getitem_4_0, cached_getitem_4_1, x, timestep, text):
    reshape_default = torch.ops.aten.reshape.default(forced, [])
    reshape_default_1 = torch.ops.aten.reshape.default(distance, [])
    reshape_default_2 = torch.ops.aten.reshape.default(computed, [])
    compute = self.compute
    reuse = self.reuse
    cond = torch.cond(reshape_default, compute, reuse, (reshape_default_1, reshape_default_2, cached_getitem_4_0, cached_getitem_4_1, x, timestep, text))
    getitem = cond[0]
    getitem_1 = cond[1]
    getitem_2 = cond[2]
    return (getitem, getitem_1, getitem_2)
""",
        )
        self.assertExpectedInline(
            code(_branch(gm, "reuse")),
            """\
def forward(self, distance, computed, cached_getitem_4_0, cached_getitem_4_1, x, timestep, text):
    model = self.model
    unsqueeze = torch.ops.aten.unsqueeze.default(timestep, 1)
    model_time_embedder = model.time_embedder(unsqueeze)
    unsqueeze_1 = torch.ops.aten.unsqueeze.default(model_time_embedder, 1)
    pow_1 = torch.ops.aten.pow.Tensor_Scalar(distance, 1)
    div = torch.ops.aten.div.Tensor(pow_1, 1)
    mul = torch.ops.aten.mul.Tensor(cached_getitem_4_1, div)
    add = torch.ops.aten.add.Tensor(cached_getitem_4_0, mul)
    add_1 = torch.ops.aten.add.Tensor(add, unsqueeze_1)
    model_proj_out = model.proj_out(add_1)
    clone_default = torch.ops.aten.clone.default(model_proj_out, memory_format = torch.contiguous_format)
    clone_default_1 = torch.ops.aten.clone.default(cached_getitem_4_0, memory_format = torch.contiguous_format)
    clone_default_2 = torch.ops.aten.clone.default(cached_getitem_4_1, memory_format = torch.contiguous_format)
    return (clone_default, clone_default_1, clone_default_2)
""",
        )


def test_a_schedule_asks_no_rule() -> None:
    one = one_graph_of(TAYLOR)
    assert not one.asks
    assert "forced" in one.part.names
    assert "fresh" not in one.part.names


def test_branches_give_memory_of_their_own() -> None:
    """`cond` refuses a branch that returns what it was given."""
    for name in ("compute", "reuse"):
        branch = _branch(one_graph_of(DEEP, EndsWithBlocks(), carry=True).part.gm, name)
        results = branch.graph.output_node().args[0]
        assert {n.target for n in results} == {torch.ops.aten.clone.default}  # type: ignore[union-attr]
        assert len(set(results)) == len(results)  # type: ignore[arg-type]


class Preamble(TestCase):
    def test_split(self) -> None:
        preamble = split_preamble(variants_of(DEEP, Masked()).compute, ())
        assert preamble is not None
        self.assertExpectedInline(
            code(preamble.part.gm),
            """\
def forward(self, text):
    select = torch.ops.aten.select.int(text, 0, 0)
    select_1 = torch.ops.aten.select.int(select, 1, 0)
    gt = torch.ops.aten.gt.Scalar(select_1, 0)
    index = torch.ops.aten.index.Tensor(text, [None, gt])
    bitwise_not = torch.ops.aten.bitwise_not.default(gt)
    index_1 = torch.ops.aten.index.Tensor(text, [None, bitwise_not])
    cat = torch.ops.aten.cat.default([index, index_1], 1)
    model_text_embedder = self.model.text_embedder(cat)
    return (model_text_embedder,)
""",
        )
        self.assertExpectedInline(
            code(preamble.rest.gm),
            """\
def forward(self, x, timestep, model_text_embedder):
    model = self.model
    model_blocks = model.blocks
    unsqueeze = torch.ops.aten.unsqueeze.default(timestep, 1)
    model_time_embedder = model.time_embedder(unsqueeze)
    unsqueeze_1 = torch.ops.aten.unsqueeze.default(model_time_embedder, 1)
    model_x_embedder = model.x_embedder(x)
    model_positions = model.positions
    add = torch.ops.aten.add.Tensor(model_x_embedder, model_positions)
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
    return (model_proj_out, getitem_4)
""",
        )

    def test_split_off_a_reused_step(self) -> None:
        variants = variants_of(DEEP, MaskedBehind())
        preamble = split_preamble(variants.reuse, variants.cached, "reused_")
        assert preamble is not None
        self.assertExpectedInline(
            code(preamble.part.gm),
            """\
def forward(self, text):
    select = torch.ops.aten.select.int(text, 0, 0)
    select_1 = torch.ops.aten.select.int(select, 1, 0)
    gt = torch.ops.aten.gt.Scalar(select_1, 0)
    index = torch.ops.aten.index.Tensor(text, [None, gt])
    bitwise_not = torch.ops.aten.bitwise_not.default(gt)
    index_1 = torch.ops.aten.index.Tensor(text, [None, bitwise_not])
    cat = torch.ops.aten.cat.default([index, index_1], 1)
    mean = torch.ops.aten.mean.default(cat)
    nonzero_default = torch.ops.aten.nonzero.default(gt)
    select_int = torch.ops.aten.select.int(nonzero_default, 1, 0)
    return (mean, select_int)
""",
        )
        self.assertExpectedInline(
            code(preamble.rest.gm),
            """\
def forward(self, cached_getitem_4_0, timestep, reused_mean, reused_select_int):
    model = self.model
    unsqueeze = torch.ops.aten.unsqueeze.default(timestep, 1)
    model_time_embedder = model.time_embedder(unsqueeze)
    unsqueeze_1 = torch.ops.aten.unsqueeze.default(model_time_embedder, 1)
    add_1 = torch.ops.aten.add.Tensor(cached_getitem_4_0, unsqueeze_1)
    model_proj_out = model.proj_out(add_1)
    mul = torch.ops.aten.mul.Tensor(model_proj_out, reused_mean)
    slice_2 = torch.ops.aten.slice.Tensor(model_proj_out, 1, 0, 5)
    index_tensor = torch.ops.aten.index.Tensor(slice_2, [None, reused_select_int])
    mean_1 = torch.ops.aten.mean.dim(index_tensor, [1], True)
    add_2 = torch.ops.aten.add.Tensor(mul, mean_1)
    return (add_2,)
""",
        )

    def test_pinned(self) -> None:
        part = pinned(variants_of(DEEP, Masked()).compute, ())
        self.assertExpectedInline(
            code(part.gm),
            """\
def forward(self, x, timestep, text):
    model = self.model
    model_blocks = model.blocks
    select = torch.ops.aten.select.int(text, 0, 0)
    select_1 = torch.ops.aten.select.int(select, 1, 0)
    gt = torch.ops.aten.gt.Scalar(select_1, 0)
    index = torch.ops.aten.index.Tensor(text, [None, gt])
    bitwise_not = torch.ops.aten.bitwise_not.default(gt)
    index_1 = torch.ops.aten.index.Tensor(text, [None, bitwise_not])
    cat = torch.ops.aten.cat.default([index, index_1], 1)
    model_text_embedder = model.text_embedder(cat)
    fixed_shape = dit_cache_fx_lowering_preamble_fixed_shape(model_text_embedder, [2, 5, 8])
    unsqueeze = torch.ops.aten.unsqueeze.default(timestep, 1)
    model_time_embedder = model.time_embedder(unsqueeze)
    unsqueeze_1 = torch.ops.aten.unsqueeze.default(model_time_embedder, 1)
    model_x_embedder = model.x_embedder(x)
    model_positions = model.positions
    add = torch.ops.aten.add.Tensor(model_x_embedder, model_positions)
    model_blocks_0 = getattr(model_blocks, "0")(add, fixed_shape, unsqueeze_1)
    getitem = model_blocks_0[0]
    getitem_1 = model_blocks_0[1]
    model_blocks_1 = getattr(model_blocks, "1")(getitem, getitem_1, unsqueeze_1)
    getitem_2 = model_blocks_1[0]
    getitem_3 = model_blocks_1[1]
    model_blocks_2 = getattr(model_blocks, "2")(getitem_2, getitem_3, unsqueeze_1)
    getitem_4 = model_blocks_2[0]
    add_1 = torch.ops.aten.add.Tensor(getitem_4, unsqueeze_1)
    model_proj_out = model.proj_out(add_1)
    return (model_proj_out, getitem_4)
""",
        )

    def test_one_graph_reads_what_the_preamble_gives(self) -> None:
        one = one_graph_of(RULE, Masked())
        assert [*one.preambles] == ["compute"]
        assert not one.asks
        self.assertExpectedInline(
            code(one.part.gm),
            """\
def forward(self, forced, cached_getitem_4_0, timestep, add, model_text_embedder):
    reshape_default = torch.ops.aten.reshape.default(forced, [])
    compute = self.compute
    reuse = self.reuse
    cond = torch.cond(reshape_default, compute, reuse, (cached_getitem_4_0, timestep, add, model_text_embedder))
    getitem = cond[0]
    getitem_1 = cond[1]
    return (getitem, getitem_1)
""",
        )


def test_no_preamble_where_no_size_depends_on_data() -> None:
    for model in (None, ByIndex()):
        compute = variants_of(DEEP, model).compute
        assert split_preamble(compute, ()) is None
        assert pinned(compute, ()) is compute


class Assertions(TestCase):
    def test_reads_become_assertions(self) -> None:
        guards = guards_of(DEEP, Reads())
        assert guards is not None
        self.assertExpectedInline(
            code(guards.gm),
            """\
def forward(self, x, timestep, text):
    select = torch.ops.aten.select.int(text, 0, 0)
    select_1 = torch.ops.aten.select.int(select, 1, 0)
    gt = torch.ops.aten.gt.Scalar(select_1, 0)
    any_1 = torch.ops.aten.any.default(gt)
    read_value = dit_cache_fx_capture_data_guards_read_value(torch.ops.aten._local_scalar_dense.default, (any_1,), {})
    sign = torch.ops.aten.sign.default(select_1)
    read_list = dit_cache_fx_capture_data_guards_read_list(sign)
    gt_1 = torch.ops.aten.gt.Scalar(select_1, 0)
    sum_1 = torch.ops.aten.sum.default(gt_1)
    read_value_1 = dit_cache_fx_capture_data_guards_read_value(torch.ops.aten._local_scalar_dense.default, (sum_1,), {})
    return (read_value, read_list, read_value_1)
""",
        )
        self.assertExpectedInline(
            code(assertions(guards, {guards.shapes(guards.expected)})),
            """\
def forward(self, x, timestep, text):
    select = torch.ops.aten.select.int(text, 0, 0)
    select_1 = torch.ops.aten.select.int(select, 1, 0)
    gt = torch.ops.aten.gt.Scalar(select_1, 0)
    any_1 = torch.ops.aten.any.default(gt)
    holds_value = dit_cache_fx_lowering_asserts_holds_value(torch.ops.aten._local_scalar_dense.default, (any_1,), {}, True)
    _assert_async_msg = torch.ops.aten._assert_async.msg(holds_value, 'the captured graph is for other data: it read True (read_value)')
    sign = torch.ops.aten.sign.default(select_1)
    holds_list = dit_cache_fx_lowering_asserts_holds_list(sign, [-1.0, 1.0, -1.0, 1.0, 1.0])
    _assert_async_msg_1 = torch.ops.aten._assert_async.msg(holds_list, 'the captured graph is for other data: it read [-1.0, 1.0, -1.0, 1.0, 1.0] (read_list)')
    gt_1 = torch.ops.aten.gt.Scalar(select_1, 0)
    sum_1 = torch.ops.aten.sum.default(gt_1)
    holds_value_1 = dit_cache_fx_lowering_asserts_holds_value(torch.ops.aten._local_scalar_dense.default, (sum_1,), {}, 3)
    _assert_async_msg_2 = torch.ops.aten._assert_async.msg(holds_value_1, 'the captured graph is for other data: it read 3 (read_value_1)')
    return ()
""",
        )

    def test_a_mask_has_to_select_as_much(self) -> None:
        guards = guards_of(DEEP, Masked())
        assert guards is not None
        self.assertExpectedInline(
            code(assertions(guards, {guards.shapes(guards.expected)})),
            """\
def forward(self, x, timestep, text):
    select = torch.ops.aten.select.int(text, 0, 0)
    select_1 = torch.ops.aten.select.int(select, 1, 0)
    gt = torch.ops.aten.gt.Scalar(select_1, 0)
    bitwise_not = torch.ops.aten.bitwise_not.default(gt)
    holds_counts = dit_cache_fx_lowering_asserts_holds_counts((gt, bitwise_not), [[3, 2]])
    _assert_async_msg = torch.ops.aten._assert_async.msg(holds_counts, 'the captured graph is for other data: its masks selected [[3, 2]] rows')
    return ()
""",
        )


def test_no_guards_where_nothing_is_read() -> None:
    assert guards_of(DEEP, Toy()) is None


def test_assertions_hold_for_the_captured_data_alone() -> None:
    guards = guards_of(DEEP, Reads())
    assert guards is not None
    check = assertions(guards, {guards.shapes(guards.expected)})
    given = inputs()
    check(*given.values())
    with pytest.raises(RuntimeError, match="the captured graph is for other data: it read"):
        check(*(given | {"text": -given["text"]}).values())


def _branch(gm: fx.GraphModule, name: str) -> fx.GraphModule:
    branch = getattr(gm, name)
    assert isinstance(branch, fx.GraphModule)
    return branch
