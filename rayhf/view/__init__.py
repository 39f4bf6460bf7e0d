"""Pages about runs: `rayhf report` writes them into a file, `rayhf dashboard` serves them live.

Everything is read from run directories. No module of this room needs Ray, torch or a GPU: what it
imports is in the `view` extra.

run.py        files of one run            samples.py    lists of samples, pairs and trees
overview.py   facts, curves, timeline     groups.py     one prompt with everything recorded
heldout.py    held-out completions        tokens.py     texts of token ids
report.py     one HTML file               evaluations.py  intervals, before and after
page.py       the HTML around both        dashboard.py  the server
                                          static/       what runs in the browser
"""
