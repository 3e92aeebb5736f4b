"A registered version is trained again from its own commit, data and parameters, whatever has become of the project since; and what is lacking is named."
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from test_dvc import done, sh, table  # noqa: E402, F401  (a fixture)

from mlops_nb.audit import events, open_state  # noqa: E402
from mlops_nb.core import MlopsError, digest, state_url  # noqa: E402
from mlops_nb.pipeline.reproduce import reproduce  # noqa: E402
from mlops_nb.pipeline.retrain import retrain  # noqa: E402
from mlops_nb.registry import resolve, versions  # noqa: E402

pytestmark = [pytest.mark.drill, pytest.mark.soak, pytest.mark.xdist_group("dvc")]
NAME = "my-project"


@pytest.fixture(scope="module")
def project(done, tmp_path_factory):  # noqa: F811
    "A project with three versions: the second trained with other parameters that are in no commit, the third with other code"
    work = tmp_path_factory.mktemp("reproduced") / "work"
    shutil.copytree(done, work)
    # version 1 was registered before anything was committed
    (work / "params.yaml").write_text(re.sub(r"margin: \S+", "margin: 1.0", (work / "params.yaml").read_text()))
    sh("git", "commit", "-qam", "a wider margin", cwd=work)
    assert retrain(work, {"base.seed": 7})["version"] == f"{NAME}/2"
    (work / "src").mkdir()
    (work / "src/own.py").write_text("LEVEL = 1\n")
    stages = yaml.safe_load((work / "dvc.yaml").read_text())
    stages["stages"]["train"]["deps"].append("src/own.py")
    (work / "dvc.yaml").write_text(yaml.safe_dump(stages))
    table(3).to_parquet(work / f"data/source/{os.listdir(work / 'data/source')[0]}")
    sh("git", "add", "-A", cwd=work)
    sh("git", "commit", "-qm", "code of one's own, other data", cwd=work)
    (work / "src/own.py").write_text("LEVEL = 2\n")
    sh("dvc", "repro", cwd=work)
    assert list(versions(NAME, root=work).version) == [3, 2, 1]
    return work


def test_a_version_that_was_retrained_is_brought_back_to_the_byte(project):
    shutil.rmtree(project / "artifacts")                     # the project itself goes on, and is not needed
    before = sh("git", "status", "--porcelain", cwd=project), digest(project / "params.yaml"), len(versions(NAME, root=project))
    told = json.loads(sh("mlops-nb", "registry", "reproduce", "2", "--json", cwd=project).split("\n{", 1)[1].join(("{", "")))
    assert told["equal"] and told["difference"] == 0 and told["labels"] == 0 and told["same_data"] and told["same_bundle"] and told["rows"] > 50
    assert before == (sh("git", "status", "--porcelain", cwd=project), digest(project / "params.yaml"), len(versions(NAME, root=project)))
    last = events(open_state(state_url(project)), limit=1)[0]
    assert (last["action"], last["subject"], last["evidence"]["digest"]) == ("reproduced", f"{NAME}/2", resolve(NAME, 2, root=project).digest)


def test_a_recipe_that_was_changed_is_found_and_another_result_is_told(project, tmp_path, monkeypatch):
    from mlops_nb.pipeline import reproduce as module

    real = module.recipe_of
    monkeypatch.setattr(module, "recipe_of", lambda client, v: {**real(client, v), "params.yaml": re.sub(r"seed: \d+", "seed: 3", real(client, v)["params.yaml"])})
    found = reproduce(NAME, 2, root=project, keep=tmp_path / "kept")
    assert not found.equal and not found.same_bundle and found.difference > 1e-9 and "NOT reproduced" in str(found)
    assert (tmp_path / "kept/code/artifacts/bundle/manifest.json").exists()


def test_what_is_lacking_is_named(project, tmp_path):
    with pytest.raises(MlopsError, match=r"outside of git|no commit|uncommitted"):
        reproduce(NAME, 1, root=project)
    with pytest.raises(MlopsError, match=r"uncommitted changes in src/own\.py; they are in no commit"):
        reproduce(NAME, 3, root=project)
    copy = tmp_path / "copy"
    shutil.copytree(project, copy)
    cache = next(p for p in (copy / ".dvc/cache").iterdir())
    cache.rename(copy / "elsewhere")
    with pytest.raises(MlopsError, match=r"its data, data/raw [0-9a-f]{32}\.dir, are neither in DVC's cache nor in a remote"):
        reproduce(NAME, 2, root=copy)
    (copy / "elsewhere").rename(cache)
    shutil.rmtree(copy / ".git")
    sh("git", "init", "-q", cwd=copy)
    with pytest.raises(MlopsError, match="is not in this repository; get it with `git fetch origin"):
        reproduce(NAME, 2, root=copy)
