"""Algorithms: one file per loop, with its config; the protocols are in base.py."""
