"The monitor's notebook as a job: its alerts name its page, and a template that is broken stops it before it works."
from pathlib import Path

import pytest

from mlops_nb.alerting import Alerting
from mlops_nb.core import MlopsError
from mlops_nb.inference_log import Batch, InferenceLog, Prediction, log_url
from mlops_nb.jobs import run_job

ROOT = Path(__file__).parents[2]
DAY, START = 86_400., 1_364_774_400.                        # 2013-04-01


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project with the job, a model that was never registered, and a week of its predictions"
    for name in ("MLOPS_NB_STATE_URL", "MLOPS_NB_LOG_URL"): monkeypatch.delenv(name, raising=False)
    (tmp_path / "params.yaml").write_text("base: {name: m}\n")
    (tmp_path / "jobs").mkdir()
    text = (ROOT / "nbs/jobs/monitor.ipynb").read_text()
    (tmp_path / "jobs/monitor.ipynb").write_text(text.replace("monitor(model=model or load_params(root / \\\"params.yaml\\\").base.name, version=version or None,", "monitor(model=__import__('mlops_nb.monitoring').monitoring.Subject('m', '3'),"))
    log = InferenceLog(log_url(tmp_path))
    for d in range(7): log.write([Batch(0., 0., [Prediction(f"{d}-{i}", "m", "3", True, {"x": 1.}, .9, 1., "", time=START + DAY * d + i) for i in range(50)])])
    return tmp_path


def test_an_alert_names_the_page_of_its_run(project):
    done = run_job("monitor", {"start": "2013-04-08", "end": "2013-04-09"}, root=project, tell=lambda text: None)
    from mlops_nb.alerting.groups import alerts
    [found] = [a for a in alerts(Alerting(project).engine) if a["type"] == "traffic_fall"]
    assert done["decision"] == "alert" and done["needs_action"]
    assert (project / found["report"]).is_file() and f"/{done['key']}/" in found["report"]


def test_a_broken_template_stops_the_job_before_it_works(project):
    (project / "params.yaml").write_text("base: {name: m}\nalert:\n  templates:\n    traffic_fall: {title: '{{ modle }}'}\n")
    with pytest.raises(MlopsError, match=r"params\.yaml:4: alert\.templates\.traffic_fall\.title: 'modle' is undefined; did you mean 'model'"):
        run_job("monitor", {"start": "2013-04-08", "end": "2013-04-09"}, root=project, tell=lambda text: None)
    assert not list((project / "artifacts/runs/monitor").glob("2013-04-08..2013-04-09"))
