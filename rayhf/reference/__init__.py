"""The reference role: frozen log-probs, refreshed from weight snapshots."""
