"""Every notebook runs from top to bottom in a kernel of Jupyter, which shows what `nbdev_test`'s shell does not: colours, rich tables, threads of its own."""
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.drill
NBS = Path(__file__).parents[2] / "nbs"
BOOKS = sorted(p for p in NBS.rglob("*.ipynb") if not {"jobs", ".ipynb_checkpoints"} & set(p.parts))


@pytest.mark.parametrize("path", BOOKS, ids=lambda p: p.relative_to(NBS).as_posix())
def test_runs_in_jupyter(path):
    book = nbformat.read(path, 4)
    book.cells = [c for c in book.cells if "nbdev.nbdev_export()" not in c.source]     # it would write the modules that others read
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
