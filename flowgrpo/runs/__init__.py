"""A run on disk and on the terminal: directory, checkpoints, progress, records."""
