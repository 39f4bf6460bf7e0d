"""Held-out evaluations of a campaign, by their config's `type`."""
