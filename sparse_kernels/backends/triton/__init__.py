"""Backend ``triton``: ``backend`` is the host's side, the other modules hold the kernels and their tiles.

Triton itself is imported by the first call that needs it.
"""
