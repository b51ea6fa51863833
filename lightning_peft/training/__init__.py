"""`PEFTStrategy` and what it does at each hook of a Lightning Trainer."""
