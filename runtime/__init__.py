"""How a script runs: composing and checking its configuration, its command line, its run directory, building.

Nothing here imports torch at module import, so that `--help` and a misspelt key answer at once. What is
trained, scored or drawn lives elsewhere.
"""
