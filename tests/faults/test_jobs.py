"What breaks a job: kill -9 at every operation on the disk, two at once, a kernel that dies, a cell that hangs. Nothing is half done, and the next run finishes."
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from waiting import until

from mlops_nb.core import MlopsError, read_json
from mlops_nb.jobs import page, run
from mlops_nb.jobs.run import Busy, is_running, list_runs, run_job

FORK = multiprocessing.get_context("fork")
MARCH = {"start": "2013-03-01", "end": "2013-04-01"}
KEY = "2013-03-01..2013-04-01"
WHOLE = ["metrics.json", "notebook.ipynb", "report.html", "run.json"]


def project(tmp_path, *cells):
    "A folder with one job"
    made = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    made.cells = [nbformat.v4.new_code_cell('start = ""\nend = ""\nout = ""', metadata={"tags": ["parameters"]}), *map(nbformat.v4.new_code_cell, cells)]
    (tmp_path / "jobs").mkdir(parents=True)
    nbformat.write(made, tmp_path / "jobs/watch.ipynb")
    (tmp_path / "params.yaml").write_text("base: {name: shop}\n")
    return tmp_path


def start(root, *options):
    "`mlops-nb job run watch` in a process of its own"
    words = ["job", "run", "watch", *(w for k, v in MARCH.items() for w in ("-p", f"{k}={v}")), *options]
    return subprocess.Popen([sys.executable, "-c", "from mlops_nb.cli import main; main()", *words], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def executed(generation):
    "In place of papermill: writes what a notebook would"

    def execute(notebook, output, values, *others):
        nb = nbformat.read(notebook, as_version=4)
        nbformat.write(nb, output)
        (output.parent / "metrics.json").write_text(json.dumps({"generation": generation}))
        return nb

    return execute


def killed_at(root, generation, number, force):
    "Run the job in a process that kills itself before its `number`-th operation on the disk; whether it came to its end"

    def child():
        count = iter(range(1, 10_000))

        def deadly(action):
            def act(*given, **named):
                if next(count) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return action(*given, **named)

            return act

        run._execute = executed(generation)
        os.fsync, shutil.rmtree = deadly(os.fsync), deadly(shutil.rmtree)
        Path.rename, Path.replace, Path.mkdir, Path.write_text = map(deadly, (Path.rename, Path.replace, Path.mkdir, Path.write_text))
        run_job("watch", MARCH, root=root, force=force, tell=lambda text: None)

    process = FORK.Process(target=child)
    process.start()
    process.join(300)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


@pytest.mark.parametrize("force", [False, True], ids=["first", "again"])
def test_kill_before_every_operation_on_the_disk(tmp_path, monkeypatch, force):
    monkeypatch.setattr(page, "render", lambda nb, name: "<p>page</p>")
    original, points = project(tmp_path / "project", "1"), 0
    monkeypatch.setattr(run, "_execute", executed("old"))
    if force:
        run_job("watch", MARCH, root=original, tell=lambda text: None)
    monkeypatch.setattr(run, "_execute", executed("next"))
    for number in range(1, 200):
        root = tmp_path / f"at{number}"
        shutil.copytree(original, root)
        ended, folder = killed_at(root, "new", number, force), root / f"artifacts/runs/watch/{KEY}"
        points += 1
        if folder.exists():
            assert sorted(p.name for p in folder.iterdir()) == WHOLE and read_json(folder / "run.json")["state"] == "done"
        assert not is_running(folder)
        told = run_job("watch", MARCH, root=root, tell=lambda text: None)
        assert sorted(p.name for p in folder.iterdir()) == WHOLE
        found = read_json(folder / "metrics.json")["generation"]
        assert found in {(False, False): ("new",), (False, True): ("old", "new")}.get((told["new"], force), ("next",))
        assert [r["state"] for r in list_runs(root)] == ["done"]
        assert not list(folder.parent.glob("*.partial"))
        shutil.rmtree(root)
        if ended:
            break
    assert 15 < points < 200


def test_two_at_once_kill_and_again(tmp_path):
    cells = ["import pathlib, time\npathlib.Path('began').touch()\nwhile not pathlib.Path('go').exists(): time.sleep(.05)",
             "import json\npathlib.Path(out, 'metrics.json').write_text(json.dumps({'decision': 'retrain', 'needs_action': True}))"]
    root = project(tmp_path, *cells)
    folder = root / f"artifacts/runs/watch/{KEY}"
    first = start(root)
    until((root / "began").exists)
    with pytest.raises(Busy, match="is running already"):
        run_job("watch", MARCH, root=root)
    assert [r["state"] for r in list_runs(root)] == ["running"]
    first.kill()
    first.communicate()
    assert [r["state"] for r in list_runs(root)] == ["interrupted"] and not folder.exists()
    (root / "go").touch()
    second = start(root)
    said, _ = second.communicate(timeout=300)
    assert second.returncode == 2 and "retrain" in said and "cell 3 of" in said
    assert sorted(p.name for p in folder.iterdir()) == WHOLE
    assert str(root) not in "".join(p.read_text() for p in folder.iterdir())
    told = run_job("watch", MARCH, root=root)
    assert (told["new"], told["needs_action"], told["attempts"]) == (False, True, 1)


def test_a_kernel_that_dies_is_tried_again_and_a_failing_cell_is_not(tmp_path):
    root = project(tmp_path, "import os, pathlib\nif not pathlib.Path('died').exists():\n    pathlib.Path('died').touch()\n    os.kill(os.getpid(), 9)", "if start.startswith('2014'): raise ValueError('no rows')")
    said = []
    assert run_job("watch", MARCH, root=root, tell=said.append)["attempts"] == 2
    assert any("DeadKernelError" in s for s in said)
    with pytest.raises(MlopsError, match="cell . failed: ValueError: no rows"):
        run_job("watch", {"start": "2014-03-01", "end": "2014-04-01"}, root=root, tell=said.append)
    assert [(r["key"][:4], r["state"]) for r in sorted(list_runs(root), key=lambda r: r["key"])] == [("2013", "done"), ("2014", "failed")]


def test_a_cell_that_hangs_is_ended(tmp_path):
    root = project(tmp_path, "import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(600)")
    with pytest.raises(MlopsError, match="it took longer than 2 s"):
        run_job("watch", MARCH, root=root, timeout=2, tell=lambda text: None)
    assert read_json(root / f"artifacts/runs/watch/{KEY}.failed/run.json")["state"] == "failed"
    if (root / "pid").exists():
        until(lambda: not Path(f"/proc/{(root / 'pid').read_text()}").exists(), 600)


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    root = project(tmp_path, "1")

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "_execute", executed("new"))
    monkeypatch.setattr(run, "_sync", full)
    with pytest.raises(MlopsError, match="No space left on device"):
        run_job("watch", MARCH, root=root, tell=lambda text: None)
    assert list_runs(root) == []


@pytest.mark.drill
def test_a_schedule_is_stopped_by_a_signal_and_takes_up_what_was_cut_off(tmp_path):
    root = project(tmp_path, "import pathlib, time\npathlib.Path('began').touch()\nwhile not pathlib.Path('go').exists(): time.sleep(.05)")
    (root / "params.yaml").write_text('base: {name: shop}\nschedule:\n  watch: {job: watch, every: 2s, window: 1d, timeout: 300}\n')
    words = [sys.executable, "-c", "from mlops_nb.cli import main; main()", "schedule", "--patience", "0"]
    first = subprocess.Popen(words, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until((root / "began").exists)
    first.terminate()
    said, _ = first.communicate(timeout=300)
    assert "stops; waits" in said and "was cut off" in said
    notes = list((root / ".mlops_nb/schedule").glob("watch@*"))
    assert notes
    meant = read_json(notes[0])["scheduled"][:10]
    (root / "go").touch()
    again = subprocess.Popen(words, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until(lambda: any(r["state"] == "done" and meant in r["key"] for r in list_runs(root)), 600)
    again.terminate()
    again.communicate(timeout=300)
