"""The run directory, which one class owns: state, checkpoints, tables, event log, inbox."""
