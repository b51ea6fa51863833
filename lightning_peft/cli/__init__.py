"""The command line, `lightning-peft`."""
