"""Callbacks beside training: progress, pictures, layout score, gates, checkpoints. Each does one thing."""
