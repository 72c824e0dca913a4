"""Files that are there whole or not at all: one writer for everything that a killed process must not leave in halves.

Nothing here knows what is in a file.
"""
