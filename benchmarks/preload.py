"""What every worker imports, for the process that they are forked from."""

import diffusers.models.transformers.dit_transformer_2d
import diffusers.models.transformers.transformer_flux
import diffusers.models.transformers.transformer_hunyuan_video15  # noqa: F401

import benchmarks.worker  # noqa: F401
