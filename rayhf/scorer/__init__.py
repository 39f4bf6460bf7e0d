"""The scorer role's engines: rule functions, reward models, and their weighted sum. Plain and synchronous.

build.py makes one engine out of the config's entries; an actor shell holds it. Importing this package imports no torch:
a rule's child process passes through here when it uses `rayhf.scorer.rules`.
"""
