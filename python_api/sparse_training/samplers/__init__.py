"""Samplers: rows of a data set drawn by what training last observed of them, before they are loaded."""
