"""Files and addresses: written whole or not at all, read within bounds, with checksums."""
