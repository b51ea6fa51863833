"""The extension API: adapters and methods, and what their authors need to place and run them."""
