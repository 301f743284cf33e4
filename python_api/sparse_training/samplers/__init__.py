"""Draws of rows by what training made of them before, for loops with a plain ``DataLoader``."""
