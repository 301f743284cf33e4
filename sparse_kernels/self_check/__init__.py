"""The self-check: kernels against the float64 reference on the device at hand, and the verdicts that are kept.

``scores``, ``moves`` and ``control`` hold the comparisons of each operation, ``cases`` lists them, ``verdicts`` keeps
the outcome on disk, and ``proof`` decides at first use whether a kernel may serve.
"""
