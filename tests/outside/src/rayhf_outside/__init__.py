"""An algorithm, a loss, a scorer and a tracker for rayhf."""
