"""The model: load it, prove it, generate, capture, patch. The only package that works with torch."""
