"""Policies: how the rows of a batch to train on are selected, one file each."""
