"""What a call is made of: nested values as tensors and a skeleton, and knowing tensors again."""
