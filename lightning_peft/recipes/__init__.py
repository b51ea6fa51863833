"""What needs more than a method: recipes on top of the public API, each a command of ``lightning-peft``."""
