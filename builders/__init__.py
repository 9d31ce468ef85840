"""Builders: one file a task, and what they share: reading a source, scoring short answers."""
