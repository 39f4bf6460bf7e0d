"""Suites of `rayhf eval`: one file each, and one line in the table SUITES of the registry."""
