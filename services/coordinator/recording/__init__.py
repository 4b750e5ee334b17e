"""What went into the core, kept and run again."""
