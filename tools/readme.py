"Make README.md from nbs/index.ipynb; with --check only say whether it is current."
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Made from nbs/index.ipynb by `make export`: edit the notebook. -->\n\n"


def readable(path: Path) -> nbformat.NotebookNode:
    "A notebook without its directives and hidden cells"
    book = nbformat.read(path, as_version=4)
    book.cells = [c for c in book.cells if not re.match(r"#\|\s*(hide|default_exp)\b", c.source)]
    for cell in book.cells:
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    book.metadata["language_info"] = {"name": "python"}
    return book


def render() -> str:
    "README.md's text"
    book = readable(ROOT / "nbs/index.ipynb")
    exporter = MarkdownExporter(config=Config(NbConvertBase={"display_data_priority": ["text/markdown", "text/plain"]}))
    text, _ = exporter.from_notebook_node(book)
    return NOTE + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    if "--check" not in sys.argv:
        readme.write_text(render())
    elif readme.read_text() != render():
        sys.exit("README.md is not what nbs/index.ipynb gives: run `make export`")
