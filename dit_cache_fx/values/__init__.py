"""The arguments of a call as tensors and a skeleton, and recognition of equal tensors."""
