"""One forward of a copy without large weights: what feeds what in a model."""
