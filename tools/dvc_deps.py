"Write each stage's import closure into dvc.yaml, which DVC does not follow by itself, and the templates that come from this repository. With --check only say whether they are current."
import ast
import sys
from io import StringIO
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
YAML_STYLE = YAML()
YAML_STYLE.width = 200
YAML_STYLE.indent(mapping=2, sequence=4, offset=2)


# Plots of a project by its task; those of this repository are in dvc.yaml
TASK_OF_PLOT = {"ROC curve": "binary", "Precision and recall": "binary", "Absolute error": "regression"}
ABSOLUTE_ERROR = {"Absolute error": {"x": "absolute_error", "y": {"reports/plots/residuals.csv": "share"}, "x_label": "absolute error", "y_label": "share of rows within"}}


def files_of(name: str) -> list[Path]:
    "The files that an import of the module `name` reads: its own and its package's, or for a package with code all of its modules"
    base = ROOT.joinpath(*name.split("."))
    if base.with_suffix(".py").exists():
        package = base.parent / "__init__.py"
        return [base.with_suffix(".py"), *([package] if base.parent.parent != ROOT and package.read_text().strip() else [])]
    if base.is_dir() and (base / "__init__.py").read_text().strip():
        return sorted(base.glob("*.py"))
    return []


def imported(path: Path) -> set[Path]:
    "The project's files that one module imports, anywhere in its text"
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            prefix = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-node.level]) if node.level else ""
            base = ".".join(filter(None, [prefix, node.module]))
            submodules = {f"{base}.{a.name}" for a in node.names if files_of(f"{base}.{a.name}")}
            names |= submodules or {base}
    return {f for n in names if n.startswith("mlops_nb.") for f in files_of(n)}


def closure(path: Path) -> set[Path]:
    "A module and all that it imports, directly or not"
    seen, todo = set(), [path]
    while todo:
        here = todo.pop()
        if here not in seen:
            seen.add(here)
            todo += imported(here)
    return seen


def wanted(stage: str) -> list[str]:
    "The exported modules that a stage uses, as dvc.yaml writes them"
    return sorted(p.relative_to(ROOT).as_posix() for p in closure(ROOT / "mlops_nb/pipeline" / f"{stage}.py"))


def template(pipeline: dict) -> str:
    "The same stages for a person's own project: no modules of this checkout, and a file as the source"
    for stage in pipeline["stages"].values():
        stage["deps"] = [d for d in stage["deps"] if not d.startswith("mlops_nb/")]
    pipeline["stages"]["ingest"].update(deps=["data/source"], params=["ingest"])   # all of it: a connector has options of its own
    plots = [*pipeline.pop("plots"), ABSOLUTE_ERROR]
    text = "# The way of the data: `dvc dag` draws it, `dvc repro` runs what has changed.\n" + dump(pipeline) + "plots:\n"
    for plot in plots:
        (name,), entry = plot, dump([plot])
        text += f'{{% if task == "{TASK_OF_PLOT[name]}" %}}\n{entry}{{% endif %}}\n' if name in TASK_OF_PLOT else entry
    return text


def dump(pipeline: dict) -> str:
    "dvc.yaml as text, comments kept"
    out = StringIO()
    YAML_STYLE.dump(pipeline, out)
    return out.getvalue()


def templates(pipeline: dict) -> dict[Path, str]:
    "What a person's own project gets from here: the stages, the job notebooks, the pages that alerts link"
    folder = ROOT / "mlops_nb/templates"
    copies = {folder / to / f.name: f.read_text() for to, found in (("jobs", "nbs/jobs/*.ipynb"), ("runbooks", "docs/runbooks/*.md")) for f in sorted(ROOT.glob(found))}
    return {folder / "dvc.yaml.j2": template(pipeline), **copies}


def main() -> int:
    "Compare or write; 1 when --check finds a difference"
    path = ROOT / "dvc.yaml"
    pipeline = YAML_STYLE.load(path.read_text())
    stale = []
    for name, stage in pipeline["stages"].items():
        data = [d for d in stage["deps"] if not d.startswith("mlops_nb/")]
        if list(stage["deps"]) != data + wanted(name):
            stale.append(name)
            stage["deps"] = data + wanted(name)
    text = dump(pipeline)
    pipeline.ca.comment = None
    old = {copy: own for copy, own in templates(pipeline).items() if not copy.exists() or copy.read_text() != own}
    if "--check" in sys.argv:
        if stale:
            print(f"dvc.yaml: dependencies of {', '.join(stale)} are not the imports of their modules; run `make export`")
        for copy in old:
            print(f"{copy.relative_to(ROOT)}: not what it is a copy of; run `make export`")
        return int(bool(stale or old))
    if stale:
        path.write_text(text)
    for copy, own in old.items():
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(own)
    return 0


if __name__ == "__main__":
    sys.exit(main())
