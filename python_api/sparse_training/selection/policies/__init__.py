"""Policies: which rows of a batch are trained on, one file each."""
