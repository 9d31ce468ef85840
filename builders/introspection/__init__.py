"""Introspection: answers, and how sure a model says it is."""
