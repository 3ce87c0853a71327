"""Pipelines with text encoders: prompts as text, saved and loaded with a cached transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from dit_cache_fx import CachedModel
from tests.pipelines import family
from tests.pipelines.families import FLUX
from tests.pipelines.family import Family, scale
from tests.pipelines.session import Session
from tests.zoo.diffusers_models import POOLED_DIM, TEXT_DIM

WORDS = ("<pad>", "<end>", "<unk>", "a", "red", "blue", "cat", "dog", "no")


def tokenizer() -> PreTrainedTokenizerFast:
    words = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    made = Tokenizer(words)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        model_max_length=8,
    )


def build() -> FluxPipeline:
    clip = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=POOLED_DIM,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        eos_token_id=1,
    )
    t5 = T5Config(
        vocab_size=len(WORDS), d_model=TEXT_DIM, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )
    parts = FLUX.build().components | {
        "text_encoder": family.built(lambda: CLIPTextModel(clip)),
        "tokenizer": tokenizer(),
        "text_encoder_2": family.built(lambda: T5EncoderModel(t5)),
        "tokenizer_2": tokenizer(),
    }
    return family.quiet(FluxPipeline(**parts))


def arguments(prompt: int = 0, size: int = 0, batch: int = 1) -> dict[str, Any]:
    texts = ["a red cat", "a blue dog"]
    return {
        "prompt": [texts[(prompt + row) % 2] for row in range(batch)],
        "negative_prompt": ["no dog"] * batch,
        "height": 8,
        "width": 8 + 4 * size,
        "max_sequence_length": 8,
    }


PROMPTED = Family("Flux", build, arguments, scale("true_cfg_scale"), FLUX.blocks, passes=2)


def test_prompts_as_text() -> None:
    session = Session(PROMPTED)
    for prompt in (0, 1, 0):
        session.check(prompt, prompt=prompt)
    session.check("batch", batch=2)
    session.check("several pictures of a prompt", num_images_per_prompt=2)
    assert not torch.equal(session.plain(), session.plain(prompt=1))


def test_a_saved_pipeline_has_the_original_transformer(tmp_path: Path) -> None:
    session = Session(PROMPTED)
    session.check("first")
    session.pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is FluxPipeline
    assert type(loaded.transformer) is FluxTransformer2DModel
    again = Session(PROMPTED, pipe=family.quiet(loaded))
    for name, weight in session.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight)
    torch.testing.assert_close(again.plain(), session.plain())
    again.check("loaded")
    again.pipe.transformer = again.cached
    assert isinstance(again.pipe.components["transformer"], FluxTransformer2DModel)
    assert isinstance(again.pipe.components["transformer"], CachedModel)
