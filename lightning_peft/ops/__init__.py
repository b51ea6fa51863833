"""Tensor functions with their own autograd, and the full and local values of sharded tensors."""
