"""Preparation: from shards to shards, in stages that chain and can each be run again."""
