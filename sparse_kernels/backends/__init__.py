"""The backends: modules that serve the operations, one for each way to compute.

``cpp`` runs on CPU tensors, ``triton`` and ``cuda`` on tensors of an NVIDIA GPU. The fourth, ``torch``, is
``sparse_kernels.reference``. ``sparse_kernels._dispatch`` lists what each serves.
"""
