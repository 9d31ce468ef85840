"""Replay: answers that were written elsewhere, traced."""
