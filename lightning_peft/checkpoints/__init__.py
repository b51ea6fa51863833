"""Adapter state, its metadata and adapter folders: written, read and checked, without Lightning."""
