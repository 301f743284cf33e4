"""Sphinx configuration: ``make docs``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from urllib.request import urlopen

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python_api")]

from sparse_kernels._version import __version__  # noqa: E402

project = "sparse-kernels"
author = "the authors of sparse-kernels"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes in a list, not as objects that autodoc describes a second time
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"sparse-kernels {release}"
html_static_path = ["_static"]
html_show_copyright = False
copybutton_prompt_text = "$ "

INVENTORIES = {
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
}


def reachable(address: str) -> bool:
    """True where the inventory can be read within two seconds; a build without a network leaves its links out."""
    try:
        with urlopen(address + "objects.inv", timeout=2):
            return True
    except OSError:
        return False


# SPARSE_DOCS_OFFLINE=1 asks nothing of a network.
offline = os.environ.get("SPARSE_DOCS_OFFLINE", "") not in ("", "0")
intersphinx_mapping = {
    name: (address, None) for name, address in INVENTORIES.items() if not offline and reachable(address)
}
intersphinx_timeout = 5
