"""Releasing a dataset on the Hub: stage, commit, tag."""
