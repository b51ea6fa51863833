"""Several adapters over one base: added, combined, merged, merged file by file, or one for each row of a batch."""
