"""Reads rows from files, folders and the hub into files that are mapped into memory."""
