"""How a script runs: composing and checking its configuration, its command line, its run directory, building, training.

What is imported before a configuration is checked imports no torch, so that `--help` and a misspelt key answer at once. What is
sampled, evaluated or prepared lives in packages of those names, which import this one.
"""
