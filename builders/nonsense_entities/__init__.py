"""Nonsense entities: questions about things that do not exist."""
