"""The training step and loop, and what they keep."""
