"""Scorers: what rows are judged by, one file each."""
