"""Autograd functions of adapted layers, and access to the values of sharded tensors."""
