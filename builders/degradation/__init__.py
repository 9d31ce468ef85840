"""Degradation: a model at work while its weights are damaged step by step."""
