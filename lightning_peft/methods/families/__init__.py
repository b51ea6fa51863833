"""Adapter modules that several methods share."""
