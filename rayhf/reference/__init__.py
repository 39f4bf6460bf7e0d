"""The reference role: frozen log-probs, refreshed from weight snapshots where the algorithm asks
for it."""
