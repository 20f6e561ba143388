"""Everything that is read from and written to disk: weights, checkpoints, model folders. Writes are atomic."""
