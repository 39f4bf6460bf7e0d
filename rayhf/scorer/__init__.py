"""Scorers: rules in child processes, reward and preference models, judges, and their combination.

protocol.py is the interface, build.py starts the scorers of a config, combine.py makes them one.
Importing this package imports no torch: the child process of a rule imports it for
`rayhf.scorer.rules`.
"""
