"""The model: load it, prove it, generate, capture, patch, damage. The only package that works with torch."""
