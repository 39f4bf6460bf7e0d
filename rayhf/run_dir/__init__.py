"""The run directory: its state, checkpoints, tables and inbox."""
