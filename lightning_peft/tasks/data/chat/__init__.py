"""Reads conversations, and turns them into tokens with labels."""
