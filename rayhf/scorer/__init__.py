"""The scorer role's engines: rules in child processes, reward and preference models, judges, and
their combination. Plain and synchronous; each can score answers and compare them.

build.py makes one engine out of the config's entries; an actor shell holds it. Importing this
package imports no torch: a rule's child process passes through here when it uses
`rayhf.scorer.rules`.
"""
