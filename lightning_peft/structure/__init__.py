"""The parts of a base model: layer types, quantized layers, attention calls, roles and their selection."""
