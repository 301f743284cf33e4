#!/usr/bin/env bash
# For each Python given: builds the wheel, installs it with the PyTorch that pip finds for it, in an environment of its
# own outside of this checkout (what is committed of it), and runs the training smoke there. A Python that is absent is named and passed over.
# What pyproject.toml's classifiers list is what this was run with.
set -euo pipefail
unset PYTHONPATH
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for python in "$@"; do
  if ! "$python" -c 'import venv' 2>/dev/null; then
    echo "wheels: no $python here" >&2
    continue
  fi
  here=$(mktemp -d -p "$work")
  mkdir "$here/source"
  git -C "$root" archive HEAD | tar -x -C "$here/source"
  SPARSE_KERNELS_BUILD=cpu "$python" -m pip wheel -qq --no-deps --wheel-dir "$here" "$here/source"
  "$python" -m venv "$here/venv"
  "$here/venv/bin/python" -m pip install -qq --no-compile "$here"/*.whl pytest
  cp "$root/tests/test_smoke.py" "$here/"
  (cd "$here" && venv/bin/python -c 'import sys, torch, sparse_kernels as sk
print("Python", sys.version.split()[0], "torch", torch.__version__, sk.__file__)
assert "site-packages" in sk.__file__
assert sk.backend_info()["row_stats"]["active"] == "cpp"' && venv/bin/python -m pytest -q -p no:cacheprovider test_smoke.py)
  rm -rf "$here"
done
