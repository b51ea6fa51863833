"""Reads images, and makes pixels of them."""
