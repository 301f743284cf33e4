"""The kernels that Triton compiles. Nothing here is imported before a call needs it."""
