"""Scorers: how the rows of a batch are scored for a policy, one file each."""
