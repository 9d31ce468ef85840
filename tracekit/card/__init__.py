"""The README of a dataset with its figures and its loading script, made from the manifest alone."""
