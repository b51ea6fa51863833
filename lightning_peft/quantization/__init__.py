"""Storage of the frozen base in 4 or 8 bits, and the way back."""
