"""``python -m sparse_kernels``: which backend serves which operation, and why the others do not."""

from sparse_kernels import __version__, backend_info

if __name__ == "__main__":
    print(f"sparse-kernels {__version__}")
    print(backend_info())
