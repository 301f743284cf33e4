"""Comparisons of policies at equal cost."""
