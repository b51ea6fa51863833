"""What an adapter holds, and what memory a training step takes."""
