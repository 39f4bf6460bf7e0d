"""What an outsider tried against rayhf, by kind: `python -m tests.chaos attack`.

Each module has ATTACKS, a table of Attack. An attack damages, floods or deceives, as a user, a
model or another process could, and returns its figures; what must hold is checked with
tests.chaos.harness.check.
"""
