"""Data: sources of Scenes, shards of them, and the batches that training reads.

Nothing is imported here, so that a command which only needs the order of samples does not load Lightning; models
are never imported from this package.
"""
