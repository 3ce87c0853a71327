"""A cached model on several processes does what it does on one.

    torchrun --nproc_per_node 2 examples/several_devices.py           # context parallelism
    torchrun --nproc_per_node 2 examples/several_devices.py fsdp      # weights in shards

Needs no GPU: the processes talk by gloo. With GPUs it is "nccl", and each process calls
`torch.cuda.set_device(local_rank)` and moves the model there.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FluxTransformer2DModel
from torch.distributed.fsdp import fully_shard

import dit_cache_fx

STEPS = 20


def tiny_flux() -> FluxTransformer2DModel:
    """A Flux of random weights, the same in each process."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    return model.eval()


def spread(model: FluxTransformer2DModel, how: str) -> None:
    """Let the processes run the model together."""
    if how == "fsdp":
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            fully_shard(block)
        fully_shard(model)
    else:
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=dist.get_world_size()))


@torch.no_grad()
def sample(model: Any) -> torch.Tensor:
    """An Euler sampler from the same noise in each process."""
    torch.manual_seed(1)
    latents, prompt, pooled = torch.randn(1, 16, 4), torch.randn(1, 8, 32), torch.randn(1, 32)
    image_ids, text_ids = torch.zeros(16, 3), torch.zeros(8, 3)
    for step in range(STEPS):
        velocity = model(
            hidden_states=latents,
            encoder_hidden_states=prompt,
            pooled_projections=pooled,
            timestep=torch.tensor([1 - step / STEPS]),
            img_ids=image_ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0]
        latents = latents - velocity / STEPS
    return latents


def main(how: str) -> None:
    """Sample on one process, then on all of them, and compare."""
    torch.accelerator.device_count = lambda: 1  # diffusers asks for it; a CPU alone has none
    options = {"strategy": "teacache", "rel_l1_thresh": 0.1}
    alone = dit_cache_fx.apply(tiny_flux(), **options)
    on_one = sample(alone)

    model = tiny_flux()
    spread(model, how)
    cached = dit_cache_fx.apply(model, **options)
    on_all = sample(cached)

    steps = [record.action for record in cached.cache_report().timeline]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, steps)
    if dist.get_rank() == 0:
        print(f"{how} on {dist.get_world_size()} processes")
        print(f"steps computed: {steps.count('computed')} of {STEPS}")
        print(f"all processes decided alike: {all(own == steps for own in gathered)}")
        print(f"as on one process: {torch.allclose(on_all, on_one, rtol=1e-5, atol=1e-5)}")
        held, before = (m.cache_report().bytes_held for m in (cached, alone))
        print(f"held by this process: {held} bytes (one process alone: {before})")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(sys.argv[1] if len(sys.argv) > 1 else "context")
    gc.collect()  # the models refer to groups, whose threads must not outlive Python
    dist.destroy_process_group()
