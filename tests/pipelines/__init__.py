"""Whole diffusers pipelines, tiny and of random weights, with a cached transformer."""
