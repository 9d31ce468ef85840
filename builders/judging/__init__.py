"""Judges of answers: by rules, or a model that is asked."""
