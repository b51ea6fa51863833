"""Pictures of the methods: ``picture`` has the shapes and colours of all, the scenes say what each method draws."""
