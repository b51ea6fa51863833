"""Reports on the content of adapters, and on the memory and traffic of a training step."""
