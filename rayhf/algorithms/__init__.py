"""The algorithms: one file per loop, with its config. The protocols are in base.py."""
