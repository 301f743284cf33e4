"""Files that the tests of data sets share."""

from pathlib import Path

import pytest
from data_files import save_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes; all images 12 pixels wide and 10 high."""
    save_image(tmp_path / "train/cat/b.png", (10, 20, 30))
    save_image(tmp_path / "train/cat/a.PNG", (40, 50, 60))
    save_image(tmp_path / "train/ant/z.bmp", 70, mode="L")
    save_image(tmp_path / "test/cat/x.png", (200, 0, 0, 255), mode="RGBA")
    (tmp_path / "train/cat/notes.txt").write_text("no image")
    (tmp_path / "train/cat/._b.png").write_text("no image")
    (tmp_path / "train/.cache").mkdir()
    return tmp_path
