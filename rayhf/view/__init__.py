"""Pages about runs: `rayhf report` writes them into a file, `rayhf dashboard` serves them live.

Everything is read from run directories, and nothing is written to them. No module of this room
needs Ray, torch or a GPU: what it imports is in the `view` extra.

run.py        files of one run            samples.py   lists of samples, pairs and trees
overview.py   facts, curves, timeline     groups.py    one prompt's samples with all their details
report.py     one HTML file               dashboard.py the server
"""
