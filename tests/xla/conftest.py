"""Only where torch-xla is: ``make test-xla`` makes that environment. Its processor device stands for a TPU."""

import importlib.util
import os

os.environ.setdefault("PJRT_DEVICE", "CPU")

collect_ignore_glob = [] if importlib.util.find_spec("torch_xla") else ["test_*.py"]
