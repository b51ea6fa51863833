"""Adapters that several methods share."""
