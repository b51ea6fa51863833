"""Encodes rows once, keeps what it made, and makes batches of rows of about the same length."""
