"""What a base model is made of: layer types, quantized layers, attention calls, roles and their selection."""
