"""The site: README, tutorials, notebooks, modules, decisions and runbooks as HTML pages in `_docs/`.

    make docs        (or: python tools/docs.py)

Sphinx reads a folder that is made for it, `_docs/source`: the notebooks without their hidden cells, and one page of signatures for each module.
Nothing is run: outputs are those that are committed. All of it can be read without a network, except that formulas are then shown as they are written.
"""
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from readme import readable

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "_docs"
PARTS = {"drift": "04_drift", "validation": "05_validation", "ingestion": "10_ingestion", "features": "12_features", "feature store": "13_feature_store", "training": "20_training", "evaluation": "21_evaluation",
         "bundle": "29_bundle", "packaging": "30_packaging", "registry": "31_registry", "inference log": "35_inference_log", "serving": "40_serving", "rollout": "50_rollout", "monitoring": "60_monitoring",
         "alerting": "61_alerting", "governance": "70_governance", "pipeline": "80_pipeline", "jobs": "81_jobs", "replay": "85_replay", "command line": "90_cli"}
CONF = '''
import sys
sys.path.insert(0, r"{root}/tools")
from docs import restore_comments
project, html_title, html_theme, language = "mlops-nb", "mlops-nb", "furo", "en"
extensions = ["myst_nb", "sphinx.ext.autodoc"]
nb_execution_mode, autodoc_typehints, autodoc_member_order, myst_heading_anchors = "off", "description", "bysource", 3
myst_enable_extensions, nb_merge_streams = ["dollarmath"], True
suppress_warnings = ["myst.xref_missing", "myst.header", "mystnb.unknown_mime_type", "misc.highlighting_failure", "ref.python"]
def setup(app): app.connect("autodoc-process-docstring", restore_comments)
'''


def plain(text: str) -> str:
    "A line without what reStructuredText would take for markup, but for its backticks"
    return re.sub(r"([*|\\]|_(?=\W|$))", r"\\\1", text)


def restore_comments(app, what, name, obj, options, lines) -> None:
    "Parameters are explained by comments beside them, which autodoc does not read"
    lines[:] = [plain(line) for line in lines]
    if what not in ("function", "method", "class"):
        return
    from fastcore.docments import docments
    try:
        told = docments(obj, full=False)
    except Exception:
        return                                                        # not written in Python, or without a source
    for parameter, text in told.items():
        if isinstance(text, str) and parameter != "self":
            lines += ["", f":returns: {plain(text)}" if parameter == "return" else f":param {parameter}: {plain(text)}"]


def notebook(path: Path, to: Path) -> None:
    "A notebook as a reader wants it"
    book = readable(path)
    for cell in book.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\((?:\.\./)*(deploy/[^)]*|CONTRIBUTING\.md)\)", r"](/\1)", cell.source)
    to.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, to)


def modules() -> list[str]:
    "All modules, those of a package after it"
    found = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in (ROOT / "mlops_nb").rglob("*.py") if "_modidx" not in p.name]
    return sorted(found)


def reference(source: Path) -> list[str]:
    "A page of signatures for each module that offers something; their names"
    names = []
    for name in modules():
        if not (offers := getattr(importlib.import_module(name), "__all__", None)):
            continue
        names.append(name)
        page = source / "api" / f"{name}.md"
        page.parent.mkdir(exist_ok=True)
        page.write_text(f"# {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members: {', '.join(offers)}\n   :undoc-members:\n```\n")
    return names


def tree(caption: str, pages: list[str]) -> str:
    "A part of the table of contents"
    return f"```{{toctree}}\n:hidden:\n:caption: {caption}\n:maxdepth: 1\n\n" + "\n".join(pages) + "\n```\n"


def make(source: Path) -> None:
    "Write Sphinx's folder"
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts and path.name != "index.ipynb":
            notebook(path, source / "nbs" / path.relative_to(ROOT / "nbs"))
    for folder in ("docs/adr", "docs/runbooks"):
        shutil.copytree(ROOT / folder, source / folder)
    for file in ("deploy/README.md", "CONTRIBUTING.md", "LICENSE"):
        (source / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, source / file)
    pages = lambda folder: [str(p.relative_to(source).with_suffix("")) for p in sorted((source / folder).glob("*")) if p.is_file()]
    parts = []
    for name, folder in PARTS.items():
        index = source / "nbs" / folder / "index.md"
        inside = [Path(p).name for p in pages(f"nbs/{folder}")]
        index.write_text(f"# {name[0].upper() + name[1:]}\n\n```{{toctree}}\n:maxdepth: 1\n\n" + "\n".join(inside) + "\n```\n")
        parts.append(f"nbs/{folder}/index")
    alone = [p for p in pages("nbs") if not p.endswith("index")]
    (source / "api").mkdir(exist_ok=True)
    (source / "api/index.md").write_text("# Modules\n\n```{toctree}\n:maxdepth: 1\n\n" + "\n".join(reference(source)) + "\n```\n")
    readme = re.sub(r"^<!--.*?-->\n+", "", (ROOT / "README.md").read_text())
    contents = [tree("Tutorials", pages("nbs/tutorials")), tree("Notebooks", alone + parts), tree("Jobs", pages("nbs/jobs")), tree("Reference", ["api/index"]),
                tree("Running it", ["deploy/README", *pages("docs/runbooks"), *pages("docs/runbooks/server")]), tree("Why it is so", ["CONTRIBUTING", *pages("docs/adr")])]
    (source / "index.md").write_text(readme + "\n" + "\n".join(contents))
    (source / "conf.py").write_text(CONF.format(root=ROOT))


if __name__ == "__main__":
    shutil.rmtree(OUT, ignore_errors=True)
    (OUT / "source").mkdir(parents=True)
    make(OUT / "source")
    done = subprocess.run([sys.executable, "-m", "sphinx", "-q", "-b", "html", "-j", "auto", "-d", OUT / "doctrees", *sys.argv[1:], OUT / "source", OUT / "html"], cwd=ROOT)
    sys.exit(done.returncode or print(f"open {(OUT / 'html/index.html').relative_to(ROOT)} in a browser"))
