"""Golden graphs of the Dynamo front end: Dynamo's graph, outlined, and the flat variants.

`EXPECTTEST_ACCEPT=1 python -m pytest tests/dynamo/test_golden.py` writes the graphs anew.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from expecttest import TestCase
from torch import fx, nn

import dit_cache_fx
from dit_cache_fx.dynamo.outline import outline
from tests.dynamo.inner import Inner
from tests.passes.toy import Toy, code, inputs


def captured(model: nn.Module) -> fx.GraphModule:
    """Dynamo's graph of a model."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(**inputs())
    return graphs[0]


def lowered(strategy: str) -> list[fx.GraphModule]:
    """The graphs that the inner compiler is given: of a computed and of a reused step."""
    inner = Inner()
    cache = dit_cache_fx.backend(strategy, no_cache_steps=[0], inner=inner)
    torch._dynamo.reset()
    model = torch.compile(Toy(2).eval(), backend=cache, fullgraph=True)
    with torch.no_grad():
        for timestep in (500.0, 400.0):
            model(**{**inputs(), "timestep": torch.full((2,), timestep)})
    return inner.graphs


def short(text: str) -> str:
    """Without what Dynamo puts around the names of the model's own tensors."""
    for word in (
        "l_self_modules_",
        "L_self_modules_",
        "l_self_",
        "L_self_",
        "_modules",
        "_parameters",
    ):
        text = text.replace(word, "_" if word.startswith("_") else "")
    text = re.sub(r" : torch[\w.]+", "", text.replace("__", "_").replace("L_", "l_"))
    return re.sub(r"^    (\w+) = \1\n", "", text, flags=re.MULTILINE)


class Golden(TestCase):
    def test_outlined(self) -> None:
        gm, lists = outline(captured(Toy(2).eval()))
        assert [(b.name, len(b.modules)) for b in lists] == [("blocks", 2)]
        self.assertExpectedInline(
            short(code(gm)),
            """\
def forward(self, l_timestep_, time_embedder_weight_, time_embedder_bias_, x_embedder_weight_, x_embedder_bias_, l_x_, parameters_positions_, text_embedder_weight_, text_embedder_bias_, l_text_, blocks_0_img_weight_, blocks_0_img_bias_, blocks_0_txt_weight_, blocks_0_txt_bias_, blocks_1_img_weight_, blocks_1_img_bias_, blocks_1_txt_weight_, blocks_1_txt_bias_, proj_out_weight_, proj_out_bias_):
    getitem = l_timestep_[(slice(None, None, None), None)]
    linear = torch._C._nn.linear(getitem, time_embedder_weight_, time_embedder_bias_)
    temb = linear[(slice(None, None, None), None)]
    linear_1 = torch._C._nn.linear(l_x_, x_embedder_weight_, x_embedder_bias_)
    img = linear_1 + parameters_positions_
    txt = torch._C._nn.linear(l_text_, text_embedder_weight_, text_embedder_bias_)
    blocks_0 = getattr(self.blocks, "0")(img, blocks_0_img_weight_, blocks_0_img_bias_, temb, txt, blocks_0_txt_weight_, blocks_0_txt_bias_)
    getitem_1 = blocks_0[0]
    getitem_2 = blocks_0[1]
    blocks_1 = getattr(self.blocks, "1")(getitem_2, blocks_1_img_weight_, blocks_1_img_bias_, temb, getitem_1, blocks_1_txt_weight_, blocks_1_txt_bias_)
    getitem_3 = blocks_1[0]
    getitem_4 = blocks_1[1]
    joined = torch.cat([getitem_4, getitem_3], dim = 1)
    getitem_5 = joined[(slice(None, None, None), slice(None, 16, None))]
    add_9 = getitem_5 + temb
    out = torch._C._nn.linear(add_9, proj_out_weight_, proj_out_bias_)
    return (out,)
""",
        )

    def test_a_block(self) -> None:
        gm, _ = outline(captured(Toy(2).eval()))
        self.assertExpectedInline(
            short(code(gm.get_submodule("blocks.0"))),
            """\
def forward(self, img, blocks_0_img_weight_, blocks_0_img_bias_, temb, txt, blocks_0_txt_weight_, blocks_0_txt_bias_):
    parts_blocks_0_img = self.parts.blocks_0_img(img, blocks_0_img_weight_, blocks_0_img_bias_)
    getitem = parts_blocks_0_img[0]
    add_1 = getitem + temb
    mean = add_1.mean(1, keepdim = True)
    mean_1 = txt.mean(1, keepdim = True)
    joint = mean + mean_1
    img_1 = img + joint
    parts_blocks_0_txt = self.parts.blocks_0_txt(joint, blocks_0_txt_weight_, blocks_0_txt_bias_)
    getitem_1 = parts_blocks_0_txt[0]
    txt_1 = txt + getitem_1
    return {0: txt_1, 1: img_1}
""",
        )

    def test_compute(self) -> None:
        self.assertExpectedInline(
            short(code(lowered("deepcache")[0])),
            """\
def forward(self, timestep, time_embedder_weight_, time_embedder_bias_, x_embedder_weight_, x_embedder_bias_, x, parameters_positions_, text_embedder_weight_, text_embedder_bias_, text, blocks_0_img_weight_, blocks_0_img_bias_, blocks_0_txt_weight_, blocks_0_txt_bias_, blocks_1_img_weight_, blocks_1_img_bias_, blocks_1_txt_weight_, blocks_1_txt_bias_, proj_out_weight_, proj_out_bias_):
    unsqueeze = torch.ops.aten.unsqueeze.default(timestep, 1)
    t = torch.ops.aten.t.default(time_embedder_weight_)
    addmm = torch.ops.aten.addmm.default(time_embedder_bias_, unsqueeze, t)
    unsqueeze_1 = torch.ops.aten.unsqueeze.default(addmm, 1)
    t_1 = torch.ops.aten.t.default(x_embedder_weight_)
    view = torch.ops.aten.view.default(x, [32, 4])
    addmm_1 = torch.ops.aten.addmm.default(x_embedder_bias_, view, t_1)
    view_1 = torch.ops.aten.view.default(addmm_1, [2, 16, 8])
    add = torch.ops.aten.add.Tensor(view_1, parameters_positions_)
    t_2 = torch.ops.aten.t.default(text_embedder_weight_)
    view_2 = torch.ops.aten.view.default(text, [10, 6])
    addmm_2 = torch.ops.aten.addmm.default(text_embedder_bias_, view_2, t_2)
    view_3 = torch.ops.aten.view.default(addmm_2, [2, 5, 8])
    linear_3 = torch._C._nn.linear(add, blocks_0_img_weight_, blocks_0_img_bias_)
    add_1 = linear_3 + unsqueeze_1
    mean = add_1.mean(1, keepdim = True)
    mean_1 = view_3.mean(1, keepdim = True)
    joint = mean + mean_1
    img_1 = add + joint
    linear_4 = torch._C._nn.linear(joint, blocks_0_txt_weight_, blocks_0_txt_bias_)
    txt_1 = view_3 + linear_4
    linear_5 = torch._C._nn.linear(img_1, blocks_1_img_weight_, blocks_1_img_bias_)
    add_5 = linear_5 + unsqueeze_1
    mean_2 = add_5.mean(1, keepdim = True)
    mean_3 = txt_1.mean(1, keepdim = True)
    joint_1 = mean_2 + mean_3
    img_2 = img_1 + joint_1
    linear_6 = torch._C._nn.linear(joint_1, blocks_1_txt_weight_, blocks_1_txt_bias_)
    txt_2 = txt_1 + linear_6
    add_6 = torch.ops.aten.add.Tensor(img_2, unsqueeze_1)
    t_3 = torch.ops.aten.t.default(proj_out_weight_)
    view_4 = torch.ops.aten.view.default(add_6, [32, 8])
    addmm_3 = torch.ops.aten.addmm.default(proj_out_bias_, view_4, t_3)
    view_5 = torch.ops.aten.view.default(addmm_3, [2, 16, 4])
    return (view_5, img_2)
""",
        )

    def test_reuse(self) -> None:
        self.assertExpectedInline(
            short(code(lowered("deepcache")[1])),
            """\
def forward(self, cached_getitem_3_0, timestep, time_embedder_weight_, time_embedder_bias_, proj_out_weight_, proj_out_bias_):
    unsqueeze = torch.ops.aten.unsqueeze.default(timestep, 1)
    t = torch.ops.aten.t.default(time_embedder_weight_)
    addmm = torch.ops.aten.addmm.default(time_embedder_bias_, unsqueeze, t)
    unsqueeze_1 = torch.ops.aten.unsqueeze.default(addmm, 1)
    add_1 = torch.ops.aten.add.Tensor(cached_getitem_3_0, unsqueeze_1)
    t_3 = torch.ops.aten.t.default(proj_out_weight_)
    view_4 = torch.ops.aten.view.default(add_1, [32, 8])
    addmm_3 = torch.ops.aten.addmm.default(proj_out_bias_, view_4, t_3)
    view_5 = torch.ops.aten.view.default(addmm_3, [2, 16, 4])
    return (view_5,)
""",
        )

    def test_reuse_of_teacache(self) -> None:
        self.assertExpectedInline(
            short(code(lowered("teacache")[1])),
            """\
def forward(self, cached_getitem_3_0, timestep, time_embedder_weight_, time_embedder_bias_, x_embedder_weight_, x_embedder_bias_, x, parameters_positions_, proj_out_weight_, proj_out_bias_):
    unsqueeze = torch.ops.aten.unsqueeze.default(timestep, 1)
    t = torch.ops.aten.t.default(time_embedder_weight_)
    addmm = torch.ops.aten.addmm.default(time_embedder_bias_, unsqueeze, t)
    unsqueeze_1 = torch.ops.aten.unsqueeze.default(addmm, 1)
    t_1 = torch.ops.aten.t.default(x_embedder_weight_)
    view = torch.ops.aten.view.default(x, [32, 4])
    addmm_1 = torch.ops.aten.addmm.default(x_embedder_bias_, view, t_1)
    view_1 = torch.ops.aten.view.default(addmm_1, [2, 16, 8])
    add = torch.ops.aten.add.Tensor(view_1, parameters_positions_)
    add_1 = torch.ops.aten.add.Tensor(add, cached_getitem_3_0)
    add_2 = torch.ops.aten.add.Tensor(add_1, unsqueeze_1)
    t_3 = torch.ops.aten.t.default(proj_out_weight_)
    view_4 = torch.ops.aten.view.default(add_2, [32, 8])
    addmm_3 = torch.ops.aten.addmm.default(proj_out_bias_, view_4, t_3)
    view_5 = torch.ops.aten.view.default(addmm_3, [2, 16, 4])
    return (view_5,)
""",
        )


def test_a_called_container_is_no_list_of_blocks() -> None:
    """Members of an `nn.Sequential` that is called stay where they are."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

        def forward(self, x: torch.Tensor, **_: Any) -> Any:
            return self.layers(x)

    graph = captured(Plain().eval())
    gm, lists = outline(graph)
    assert not lists
    assert [n.target for n in gm.graph.nodes] == [n.target for n in graph.graph.nodes]
