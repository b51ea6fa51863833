"""DataModules of the ready tasks, and what they read rows by."""
