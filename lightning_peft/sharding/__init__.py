"""Sharded models: strategies and plans."""
