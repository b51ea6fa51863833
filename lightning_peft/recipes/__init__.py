"""Recipes on top of the public API, each a command of ``lightning-peft``."""
