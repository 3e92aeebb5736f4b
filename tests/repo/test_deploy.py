"What deploy/ holds: it parses, renders, is valid to the last field, runs with no more rights than it needs, names no secret, and its rules fire when they should."
import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from functools import cache
from pathlib import Path

import jsonschema
import pytest
import yaml

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent.parent / "tools")]
import deploy as tool  # noqa: E402
from kinds import COMPOSE, KINDS  # noqa: E402
from waiting import until  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
DEPLOY = ROOT / "deploy"
MONITORING = DEPLOY / "components/monitoring"
RENDERED = ["overlays/dev", "overlays/staging", "overlays/prod", "variants/kserve", "variants/argo-rollouts", "variants/flagger"]
TEMPLATES = ["jobs/dvc-repro.yaml", "rollout/job.yaml"]
BUILT_IN = re.compile(r"^(v1|apps/v1|batch/v1|policy/v1|autoscaling/v2|networking\.k8s\.io/v1|rbac\.authorization\.k8s\.io/v1)$")
YAMLS = sorted(p for p in DEPLOY.rglob("*.y*ml") if "secrets" not in p.parts)
# Figures that the monitoring jobs hand to the server's /metrics, besides its own
GIVEN = {"model_accuracy_current", "model_accuracy_baseline", "model_data_drift_score", "model_missing_share", "model_missing_rise"}


def sh(*command, ok=True, cwd=ROOT, **env) -> str:
    "Run a program; its output"
    done = subprocess.run([str(c) for c in command], cwd=cwd, env={**os.environ, **env}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert (done.returncode == 0) == ok, done.stdout
    return done.stdout


def need(program: str) -> str:
    "A program of this machine"
    found = shutil.which(program)
    if not found:
        pytest.skip(f"{program} is not installed")
    return found


@pytest.fixture(scope="session")
def kubectl():
    "A kubectl with kustomize 5; where none can be had, tests are skipped by name"
    try:
        return tool.kubectl()
    except (OSError, subprocess.CalledProcessError) as e:
        pytest.skip(f"no kubectl: {e}")


@pytest.fixture(scope="session")
def programs():
    "hadolint and kubernetes-validate"
    try:
        return tool.programs()
    except (OSError, subprocess.CalledProcessError) as e:
        pytest.skip(f"hadolint and kubernetes-validate cannot be installed: {e}")


@cache
def render(program: str, name: str) -> tuple:
    "The objects of an overlay or variant"
    return tuple(d for d in yaml.safe_load_all(sh(program, "kustomize", DEPLOY / name)) if d)


@pytest.fixture(scope="session", params=RENDERED)
def rendered(request, kubectl):
    "Name and objects of each overlay and variant"
    return request.param, render(kubectl, request.param)


def pods(objects) -> list:
    "Name and Pod spec of all that start pods"
    found = []
    for o in objects:
        name, spec = f"{o['kind']}/{o['metadata'].get('name') or o['metadata'].get('generateName')}", o.get("spec", {})
        if o["kind"] in ("Deployment", "Job"):
            found.append((name, spec["template"]["spec"]))
        if o["kind"] == "CronJob":
            found.append((name, spec["jobTemplate"]["spec"]["template"]["spec"]))
        if o["kind"] == "InferenceService":
            found.append((name, spec["predictor"]))
    return found


def test_every_yaml_and_json_parses():
    assert len(YAMLS) > 40
    for path in YAMLS:
        assert list(yaml.safe_load_all(path.read_text())), path
    for path in DEPLOY.rglob("*.json"):
        json.loads(path.read_text())


def test_what_is_made_from_something_else_is_current():
    sh(sys.executable, "tools/deploy.py", "--check")


def test_built_in_kinds_are_strictly_valid(kubectl, programs, tmp_path):
    unique = {}
    for name in RENDERED:
        objects = render(kubectl, name)
        pod = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {k: v for k, v in spec.items() if k not in ("minReplicas", "maxReplicas", "canaryTrafficPercent")}}
               for owner, spec in pods(objects) if owner.startswith("InferenceService")]
        for o in [*(o for o in objects if BUILT_IN.match(o["apiVersion"])), *pod]:
            unique[json.dumps({**o, "metadata": {k: v for k, v in o["metadata"].items() if k != "namespace"}}).replace(o["metadata"].get("namespace", "-"), "")] = o
    made = [yaml.safe_load((DEPLOY / name).read_text().replace("generateName: ", "name: ")) for name in TEMPLATES]
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all([*unique.values(), *made]))
    told = sh(programs / "kubernetes-validate", "--strict", tmp_path / "all.yaml")
    assert "WARN" not in told and told.count("passed") == len(unique) + len(made) > 28, told
    bad = tmp_path / "bad.yaml"
    bad.write_text((DEPLOY / "base/pdb.yaml").read_text().replace("maxUnavailable", "maxUnavailble"))
    sh(programs / "kubernetes-validate", "--strict", bad, ok=False)


def test_other_kinds_are_valid(rendered):
    name, objects = rendered
    others = [o for o in objects if not BUILT_IN.match(o["apiVersion"])]
    assert others
    for o in others:
        jsonschema.validate(o, KINDS[o["kind"]])


def test_all_that_was_written_is_rendered_somewhere(kubectl):
    seen = {o["kind"] for name in RENDERED for o in render(kubectl, name)}
    assert seen >= {"Deployment", "Service", "HTTPRoute", "Gateway", "HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy", "ServiceAccount", "Role", "RoleBinding", "CronJob",
                    "ConfigMap", "ServiceMonitor", "PrometheusRule", "PersistentVolumeClaim", "Namespace", *KINDS}


def restricted(spec: dict) -> list:
    "What a Pod spec has that the pod security standard `restricted`, or we, do not allow"
    wrong, pod = [], spec.get("securityContext") or {}
    if not (pod.get("runAsNonRoot") and pod.get("runAsUser", 0) > 0 and pod.get("seccompProfile") == {"type": "RuntimeDefault"}):
        wrong.append("pod: runAsNonRoot, a user, seccompProfile RuntimeDefault")
    wrong += [f"pod: {k}" for k in ("hostNetwork", "hostPID", "hostIPC") if spec.get(k)]
    for v in spec.get("volumes") or []:
        if not v.keys() - {"name"} <= {"emptyDir", "secret", "configMap", "persistentVolumeClaim", "projected", "downwardAPI"}:
            wrong.append(f"volume {v['name']}")
        if "emptyDir" in v and "sizeLimit" not in v["emptyDir"]:
            wrong.append(f"volume {v['name']}: no limit")
    for c in [*spec.get("initContainers", []), *spec["containers"]]:
        own = c.get("securityContext") or {}
        if own.get("allowPrivilegeEscalation") is not False or own.get("readOnlyRootFilesystem") is not True or own.get("capabilities") != {"drop": ["ALL"]} or own.get("privileged"):
            wrong.append(f"{c['name']}: securityContext")
        for part in ("requests", "limits"):
            if not {"cpu", "memory"} <= c.get("resources", {}).get(part, {}).keys():
                wrong.append(f"{c['name']}: resources.{part}")
        image, _, tag = c["image"].partition(":")
        if not tag or tag == "latest" or "." in image.split("/")[0]:
            wrong.append(f"{c['name']}: image {c['image']}")
        wrong += [f"{c['name']}: {e['name']} is written out" for e in c.get("env", []) if "value" in e and re.search(r"PASSWORD|TOKEN|SECRET|_KEY$|_URL$", e["name"])]
    return wrong


def test_every_pod_is_restricted_limited_and_pinned(rendered):
    name, objects = rendered
    found = pods(objects)
    assert found
    for owner, spec in found:
        assert restricted(spec) == [], f"{name} {owner}"
        assert spec["automountServiceAccountToken"] is (spec.get("serviceAccountName") == "mlops-nb-rollout"), owner    # only the engine has rights


@pytest.mark.parametrize("name", TEMPLATES)
def test_job_templates_are_restricted_too(name):
    job = yaml.safe_load((DEPLOY / name).read_text())
    assert restricted(job["spec"]["template"]["spec"]) == []
    assert job["spec"]["activeDeadlineSeconds"] and job["spec"]["ttlSecondsAfterFinished"] and "generateName" in job["metadata"]


def test_the_check_for_restricted_pods_finds_what_is_wrong():
    spec = yaml.safe_load((DEPLOY / "base/deployment.yaml").read_text())["spec"]["template"]["spec"]
    server = spec["containers"][0]
    assert restricted(spec) == []
    for change in ({"image": "mlops-nb/serve:latest"}, {"image": "mlops-nb/serve"}, {"resources": {}}, {"securityContext": {}}, {"env": [{"name": "DB_PASSWORD", "value": "x"}]}):
        assert restricted({**spec, "containers": [{**server, **change}]}), change
    assert restricted({**spec, "securityContext": {}}) and restricted({**spec, "hostNetwork": True}) and restricted({**spec, "volumes": [{"name": "h", "hostPath": {"path": "/"}}]})


def test_probes_environment_and_selectors_are_what_the_engine_and_the_owner_expect():
    deployment = yaml.safe_load((DEPLOY / "base/deployment.yaml").read_text())
    service = yaml.safe_load((DEPLOY / "base/service.yaml").read_text())
    template, server = deployment["spec"]["template"], deployment["spec"]["template"]["spec"]["containers"][0]
    live, ready = server["livenessProbe"], server["readinessProbe"]
    assert (live["httpGet"]["path"], live["initialDelaySeconds"], live["periodSeconds"], ready["httpGet"]["path"]) == ("/health", 30, 10, "/ready")
    assert server["startupProbe"]["periodSeconds"] * server["startupProbe"]["failureThreshold"] >= deployment["spec"]["progressDeadlineSeconds"]
    assert server["ports"] == [{"name": "http", "containerPort": 8080}]
    assert {"MODEL_VERSION", "MODEL_PATH"} <= {e["name"] for e in server["env"]}
    assert server["resources"] == {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"cpu": "1", "memory": "2Gi"}}
    version = {"mlops-nb/model": "flights", "mlops-nb/version": "1"}
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == version
    assert version.items() <= template["metadata"]["labels"].items() and version.items() <= service["metadata"]["labels"].items()
    assert template["metadata"]["labels"]["app.kubernetes.io/name"] == "mlops-nb"
    linger = float(server["args"][server["args"].index("--linger") + 1])
    assert template["spec"]["terminationGracePeriodSeconds"] >= linger + 5 + 15 + 10


@pytest.mark.drill
def test_the_init_container_lays_the_version_where_the_server_reads_it(tmp_path, monkeypatch):
    import numpy as np
    import pandas as pd
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from mlops_nb.bundle import load_bundle
    from mlops_nb.packaging import package
    from mlops_nb.registry import register
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLOPS_NB_STATE_URL", raising=False)
    spec = yaml.safe_load((DEPLOY / "base/deployment.yaml").read_text())["spec"]["template"]["spec"]
    fetch, server = spec["initContainers"][0], spec["containers"][0]
    path = {c["name"]: next(e["value"] for e in c["env"] if e["name"] == "MODEL_PATH") for c in (fetch, server)}
    assert path["fetch"] == path["server"] and fetch["command"] == ["python", "-c"]
    x = pd.DataFrame({"a": np.arange(60.0), "b": np.arange(60.0) % 7})
    bundle = package(make_pipeline(StandardScaler(), LogisticRegression()).fit(x, x.a > 30), tmp_path / "made", name="flights", sample=x)
    register(bundle, root=tmp_path, actor="ada")
    there = tmp_path / "models/bundle"
    sh(sys.executable, "-c", fetch["args"][0], cwd=tmp_path, MODEL_NAME="flights", MODEL_VERSION="1", MODEL_PATH=str(there), PYTHONPATH=str(ROOT))
    assert load_bundle(there).digest == bundle.digest
    told = sh(sys.executable, "-c", fetch["args"][0], cwd=tmp_path, ok=False, MODEL_NAME="flights", MODEL_VERSION="9", MODEL_PATH=str(tmp_path / "other"), PYTHONPATH=str(ROOT))
    assert "9" in told.splitlines()[-1] and not (tmp_path / "other").exists()


def test_selectors_find_what_they_are_meant_for(rendered):
    name, objects = rendered
    labels = [o["spec"]["template"]["metadata"]["labels"] for o in objects if o["kind"] == "Deployment"]
    labels += [o["spec"]["jobTemplate"]["spec"]["template"]["metadata"]["labels"] for o in objects if o["kind"] == "CronJob"]
    labels += [yaml.safe_load((DEPLOY / t).read_text())["spec"]["template"]["metadata"]["labels"] for t in TEMPLATES]
    for o in objects:
        spec = o.get("spec", {})
        wanted = spec.get("podSelector", {}).get("matchLabels") if o["kind"] == "NetworkPolicy" else spec.get("selector", {}).get("matchLabels") if o["kind"] == "PodDisruptionBudget" else spec.get("selector") if o["kind"] == "Service" else None
        assert not wanted or any(wanted.items() <= found.items() for found in labels), f"{name}: {o['kind']}/{o['metadata']['name']} selects nothing"
    names = {(o["kind"], o["metadata"]["name"]) for o in objects}
    for o in objects:
        if o["kind"] == "HTTPRoute":
            refs = [r for rule in o["spec"]["rules"] for r in rule["backendRefs"]]
            assert all(("Service", r["name"]) in names for r in refs) and sum(r["weight"] for r in refs) == 100
        if o["kind"] == "HorizontalPodAutoscaler":
            assert (o["spec"]["scaleTargetRef"]["kind"], o["spec"]["scaleTargetRef"]["name"]) in names
        if o["kind"] in ("Deployment", "CronJob", "InferenceService"):
            account = pods([o])[0][1]["serviceAccountName"]
            assert ("ServiceAccount", account) in names
        if o["kind"] == "RoleBinding":
            assert all(s["namespace"] == o["metadata"]["namespace"] for s in o["subjects"])


@pytest.mark.parametrize("name", ["argo-rollouts", "flagger"])
def test_another_engine_can_release_a_version_of_the_same_deployment(kubectl, name):
    "The version is a label of the pod template, which a selector must leave free; Flagger wants one label that it knows, and its queries name the Services that it makes"
    objects = render(kubectl, f"variants/{name}")
    found = {o["kind"]: o for o in objects if o["metadata"]["name"].startswith("flights")}
    spec = found["Deployment"]["spec"]
    selector, labels = spec["selector"]["matchLabels"], spec["template"]["metadata"]["labels"]
    assert labels["mlops-nb/version"] == "1" and "mlops-nb/version" not in selector and selector.items() <= labels.items()
    queries = [str(o["spec"]) for o in objects if o["kind"] in ("MetricTemplate", "AnalysisTemplate")]
    assert queries and all("namespace=" in q for q in queries)
    if name == "flagger":
        service = found["Canary"]["spec"]["service"]
        assert selector == {"app": "flights"} and all("{{ target }}" not in q and "{{ service }}-canary" in q for q in queries)
        assert all(service[k]["labels"]["app.kubernetes.io/name"] == "mlops-nb" for k in ("primary", "canary"))     # what the ServiceMonitor asks for


def test_everything_is_closed_but_what_is_named(kubectl):
    policies = [o for o in render(kubectl, "overlays/prod") if o["kind"] == "NetworkPolicy"]
    shut = next(p for p in policies if p["metadata"]["name"] == "default-deny")
    assert shut["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for p in policies:
        for rule in [*p["spec"].get("ingress", []), *p["spec"].get("egress", [])]:
            assert rule.get("ports"), p["metadata"]["name"]
        for rule in p["spec"].get("ingress", []):
            assert rule.get("from"), p["metadata"]["name"]
    for name in ("dev", "staging", "prod"):
        space = next(o for o in render(kubectl, f"overlays/{name}") if o["kind"] == "Namespace")
        assert space["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
        assert {o["metadata"].get("namespace") for o in render(kubectl, f"overlays/{name}") if o["kind"] != "Namespace"} == {space["metadata"]["name"]}


def test_the_engine_has_a_role_in_its_namespace_and_nothing_more(kubectl):
    objects = render(kubectl, "overlays/prod")
    assert not [o for o in objects if o["kind"].startswith("ClusterRole")]
    rules = next(o for o in objects if o["kind"] == "Role")["rules"]
    for rule in rules:
        assert not {"*"} & {*rule["verbs"], *rule["resources"], *rule["apiGroups"]}
        assert not {"secrets", "pods/exec", "roles", "rolebindings", "serviceaccounts"} & {*rule["resources"]}
    tried = ROOT / "tests/rollout/real_cluster.py"       # the rights with which the engine works on a real API server
    if tried.exists():
        role = ast.literal_eval(next(n.value for n in ast.parse(tried.read_text()).body if isinstance(n, ast.Assign) and n.targets[0].id == "ROLE"))
        same = lambda rules: sorted((r["apiGroups"], r["resources"], sorted(r["verbs"])) for r in rules)
        assert same(rules) == same(role)
    allowed = {(r, v) for rule in rules for r in rule["resources"] for v in rule["verbs"]}
    assert allowed >= {("deployments", "create"), ("deployments", "update"), ("deployments", "delete"), ("services", "create"), ("httproutes", "get"), ("httproutes", "update"), ("pods", "list"), ("endpointslices", "list"), ("horizontalpodautoscalers", "create")}


def test_the_engine_can_start_versions_from_the_template_here():
    pytest.importorskip("mlops_nb.rollout.kubernetes")
    from mlops_nb.rollout.kubernetes import Kubernetes, deployment, service
    from mlops_nb.rollout.ports import Revision
    settings = Kubernetes(image="mlops-nb/serve:0.1.0", namespace="mlops-nb-prod", template=str(DEPLOY / "base/deployment.yaml"))
    made = deployment("flights", Revision("2", "models:/flights/2", "d" * 64), 3, 1, settings, ROOT)
    first, base = (yaml.safe_load((DEPLOY / f"base/{n}.yaml").read_text()) for n in ("deployment", "service"))
    template = made["spec"]["template"]
    assert restricted(template["spec"]) == [] and template["spec"] == first["spec"]["template"]["spec"]
    assert made["spec"]["selector"]["matchLabels"] == {**first["spec"]["selector"]["matchLabels"], "mlops-nb/version": "2"}
    assert template["metadata"]["labels"].items() >= {**first["spec"]["template"]["metadata"]["labels"], "mlops-nb/version": "2"}.items()
    assert service("flights", Revision("1", "", ""), settings)["spec"]["selector"] == base["spec"]["selector"]


def test_the_engine_starts_what_an_overlay_says_of_its_server(kubectl, tmp_path):
    "Zones, image and pull secrets of an overlay hold for every version; the guard's Deployment beside it is not taken for a server, and each version is spread by itself"
    from mlops_nb.rollout.manifests import Kubernetes, deployment
    from mlops_nb.rollout.ports import Revision
    objects = render(kubectl, "overlays/prod")
    (tmp_path / "prod.yaml").write_text(yaml.safe_dump_all(objects))
    settings = Kubernetes(image="mlops-nb/serve:0.1.0", namespace="mlops-nb-prod", template=str(tmp_path / "prod.yaml"))
    made = deployment("flights", Revision("2", "models:/flights/2", "ab"), 3, 1, settings)["spec"]["template"]
    [first] = [o for o in objects if o["kind"] == "Deployment" and o["metadata"]["name"] == "flights-1"]
    assert made["spec"] == first["spec"]["template"]["spec"] and made["metadata"]["labels"]["mlops-nb/version"] == "2"
    spread = made["spec"]["topologySpreadConstraints"]
    assert [s["topologyKey"].split("/")[-1] for s in spread] == ["zone", "hostname"] and all(s["matchLabelKeys"] == ["mlops-nb/version"] for s in spread)


def test_cron_jobs_never_overlap_and_end(kubectl):
    jobs = [o for o in render(kubectl, "overlays/prod") if o["kind"] == "CronJob"]
    assert {j["metadata"]["name"] for j in jobs} == {"monitor", "retrain"}
    for j in jobs:
        spec = j["spec"]
        assert spec["concurrencyPolicy"] == "Forbid" and spec["startingDeadlineSeconds"] >= 60
        assert spec["successfulJobsHistoryLimit"] and spec["failedJobsHistoryLimit"] and spec["jobTemplate"]["spec"]["activeDeadlineSeconds"]
        args = pods([j])[0][1]["containers"][0]["args"]
        assert (args[:3], args[4], args[-1]) == (["job", "run", "--timeout"], "--last", j["metadata"]["name"]) and int(args[3]) < spec["jobTemplate"]["spec"]["activeDeadlineSeconds"]


def test_cron_systemd_and_cron_jobs_say_the_same_times():
    from datetime import UTC, datetime, timedelta

    from apscheduler.triggers.cron import CronTrigger
    lines = [line.split(None, 6) for line in (DEPLOY / "cron/mlops-nb").read_text().splitlines() if re.match(r"[0-9*]", line)]
    assert len(lines) == 2
    for line in lines:
        job = line[6].rsplit(" ", 1)[-1]
        assert " ".join(line[:5]) == yaml.safe_load((DEPLOY / f"jobs/{job}.yaml").read_text())["spec"]["schedule"]
        CronTrigger.from_crontab(" ".join(line[:5]))
        assert "flock -n" in line[6] and "timeout" in line[6] and re.search(rf"mlops-nb job run --timeout \d+ --last 1[hw] (-p act=true )?{job}$", line[6])
        if shutil.which("systemd-analyze"):
            text = (DEPLOY / f"systemd/mlops-nb-{job}.timer").read_text()
            when = re.search(r"^OnCalendar=(.*)$", text, re.M)[1]
            told = re.findall(r"(?:Next elapse|Iter\. #\d+): \w+ ([0-9: -]+) UTC", sh("systemd-analyze", "calendar", "--base-time=2026-01-01 00:00:00 UTC", "--iterations=3", when, TZ="UTC"))
            day = {"*": "*", "0": "sun"}[line[4]]
            trigger, at = CronTrigger(minute=line[0], hour=line[1], day_of_week=day, timezone=UTC), datetime(2026, 1, 1, tzinfo=UTC)
            for moment in told:
                at = trigger.get_next_fire_time(None, at)
                assert moment == f"{at:%Y-%m-%d %H:%M:%S}"
                at += timedelta(seconds=1)
            assert len(told) == 3


def test_systemd_units_are_complete_and_careful():
    units = sorted((DEPLOY / "systemd").glob("*.service"))
    assert len(units) == 3
    for path in units:
        unit = configparser.ConfigParser(strict=False, interpolation=None)
        unit.optionxform = str
        unit.read(path)
        service = unit["Service"]
        assert service["NoNewPrivileges"] == "yes" and service["ProtectSystem"] == "strict" and service["User"] == "mlops" and service["ReadWritePaths"]
        assert service["ExecStart"].startswith("/srv/mlops-nb/.venv/bin/mlops-nb ")
    if shutil.which("systemd-analyze"):
        told = subprocess.run(["systemd-analyze", "verify", *sorted((DEPLOY / "systemd").iterdir())], capture_output=True, text=True)
        assert all("is not executable" in line for line in (told.stdout + told.stderr).splitlines() if "mlops-nb" in line), told.stderr


# Rules, dashboards, Alertmanager

@pytest.fixture(scope="module")
def promtool():
    return need("promtool")


def test_rules_are_valid_and_fire_when_they_should(promtool):
    assert "SUCCESS" in sh(promtool, "check", "rules", MONITORING / "rules.yaml")
    assert "SUCCESS" in sh(promtool, "test", "rules", MONITORING / "rules.test.yaml")


@pytest.mark.drill
@pytest.mark.parametrize("old, new", [("* (1 - 0.05)", "* (1 - 0.10)"), ("model_data_drift_score > 0.1", "model_data_drift_score > 0.3"), ("> 0.02", "> 0.05"), ("p95_5m > 1.0", "p95_5m > 2.0"),
                                      ("model_missing_rise > 0.05", "model_missing_rise > 0.02"), ('{reason=~"5.."}', "")])
def test_the_tests_of_the_rules_notice_another_threshold(promtool, tmp_path, old, new):
    text = (MONITORING / "rules.yaml").read_text()
    assert text.count(old) == 1
    (tmp_path / "rules.yaml").write_text(text.replace(old, new))
    shutil.copy(MONITORING / "rules.test.yaml", tmp_path)
    sh(promtool, "test", "rules", tmp_path / "rules.test.yaml", ok=False)


def alerts() -> list:
    return [r for g in yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"] for r in g["rules"] if "alert" in r]


def test_the_owners_alerts_are_there_with_their_severities_and_each_is_tested():
    found = {a["alert"]: a["labels"]["severity"] for a in alerts()}
    assert found.items() >= {"accuracy_degradation": "high", "high_latency": "medium", "high_error_rate": "critical", "data_drift": "medium", "high_missing_data": "medium"}.items()
    tested = yaml.safe_load((MONITORING / "rules.test.yaml").read_text())["tests"]
    fired = {c["alertname"] for t in tested for c in t.get("alert_rule_test", []) if c["exp_alerts"]}
    quiet = {c["alertname"] for t in tested for c in t.get("alert_rule_test", []) if not c["exp_alerts"]}
    assert fired == quiet == found.keys()
    for a in alerts():
        assert {"summary", "description", "action"} <= a["annotations"].keys() and {"severity", "category"} <= a["labels"].keys()
        own = a["alert"] in ("server_down", "spool_near_bound", "reload_failing")     # of Prometheus only; the others are rules of mlops_nb.alerting too
        page = a["annotations"]["runbook_url"]
        assert page == f"docs/runbooks/{'server/' if own else ''}{a['alert']}.md"
        if own or (ROOT / "docs/runbooks/README.md").exists():
            assert (ROOT / page).is_file(), page


@cache
def known_metrics() -> frozenset:
    "The names of all series that a server can show, and of recorded ones"
    from mlops_nb.serving.metrics import Metrics
    names = set(GIVEN)
    for family in Metrics().registry.collect():
        names |= {"counter": {f"{family.name}_total"}, "histogram": {f"{family.name}_{p}" for p in ("bucket", "sum", "count")}}.get(family.type, {family.name})
    return frozenset(names | {"up"} | {r["record"] for g in yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"] for r in g["rules"] if "record" in r})


def series(expr: str) -> set:
    "Names of series in a query: words before a brace, a range, or alone, that are no function, keyword or label"
    bare = re.sub(r'"[^"]*"', '""', expr)
    bare = re.sub(r"\b(by|on|without|ignoring|group_left|group_right)\s*\([^)]*\)", " ", bare)
    bare = re.sub(r"\{[^}]*\}", "{}", bare)
    bare = re.sub(r"\[[^\]]*\]", "", bare)
    words = re.findall(r"(?<![\w:.$])([a-zA-Z_:][\w:]*)(?!\s*\()(?![\w:])", bare)
    return {w for w in words if w not in {"and", "or", "unless", "by", "on", "sum", "max", "min", "count", "avg", "bool", "offset"}}


def queries() -> dict:
    "Where -> query, of rules, dashboards, and analyses of other rollout engines"
    found = {f"rules {r.get('alert') or r['record']}": r["expr"] for g in yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"] for r in g["rules"]}
    for path in (MONITORING / "dashboards").glob("*.json"):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                found[f"{path.name} {panel['title']} {target['refId']}"] = target["expr"].replace("$__rate_interval", "5m")
    for path in (DEPLOY / "variants/argo-rollouts/analysis.yaml", DEPLOY / "variants/flagger/canary.yaml"):
        for o in yaml.safe_load_all(path.read_text()):
            for m in o["spec"].get("metrics", [o["spec"]] if "query" in o["spec"] else []):
                text = m["query"] if "query" in m else m["provider"]["prometheus"]["query"]
                found[f"{path.name} {o['metadata']['name']} {m.get('name', '')}"] = re.sub(r"\{\{\s*interval\s*\}\}", "5m", text).replace("{{", "").replace("}}", "")
    return found


def test_every_query_asks_for_series_that_exist():
    assert len(queries()) > 45
    for where, expr in queries().items():
        assert series(expr) and series(expr) <= known_metrics(), f"{where}: {series(expr) - known_metrics()}"
    assert series('a_b{x="y"} / on (c) group_left () (sum by (d) (rate(e:f[5m])) > 0) or vector(1)') == {"a_b", "e:f"}


def test_every_query_is_one(promtool, tmp_path):
    rules = [{"record": f"q:{i}", "expr": expr} for i, expr in enumerate(queries().values())]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    assert f"{len(rules)} rules found" in sh(promtool, "check", "rules", tmp_path / "r.yaml")


@pytest.mark.parametrize("path", sorted((MONITORING / "dashboards").glob("*.json")), ids=lambda p: p.stem)
def test_dashboards_are_loadable(path):
    board = json.loads(path.read_text())
    assert board["uid"] and board["title"] and board["schemaVersion"] >= 36 and board["time"] and "id" not in board
    ids, cells = [p["id"] for p in board["panels"]], set()
    assert len(ids) == len(set(ids))
    variables = {v["name"] for v in board["templating"]["list"]}
    assert set(re.findall(r"\$\{?([a-z]+)\}?", json.dumps(board["panels"]))) <= variables
    for p in board["panels"]:
        g = p["gridPos"]
        own = {(x, y) for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])}
        assert not own & cells and g["x"] + g["w"] <= 24, p["title"]
        cells |= own
        assert p["title"] and p["type"] in ("timeseries", "heatmap", "table", "stat") and p["targets"]


def test_dashboards_are_all_in_the_config_map(kubectl):
    maps = [o for o in render(kubectl, "overlays/prod") if o["kind"] == "ConfigMap" and o["metadata"].get("labels", {}).get("grafana_dashboard") == "1"]
    assert {n for m in maps for n in m["data"]} == {p.name for p in (MONITORING / "dashboards").glob("*.json")}


def test_alertmanager_tells_whom_it_should():
    amtool, config = need("amtool"), DEPLOY / "compose/alertmanager/alertmanager.yml"
    assert "SUCCESS" in sh(amtool, "check-config", config)
    told = {labels: sh(amtool, "config", "routes", "test", f"--config.file={config}", *labels.split()).splitlines()[-1] for labels in
            ("severity=critical", "severity=critical urgent=true", "severity=high", "severity=high urgent=true", "severity=medium", "severity=low")}
    # amtool does not look at the clock: sms is muted in business hours for all but critical alerts
    assert list(told.values()) == ["chat,mail,pager,sms", "chat,pager,sms", "chat,mail,sms", "chat,sms", "chat,sms", "mail,sms"]
    routes = yaml.safe_load(config.read_text())["route"]["routes"]
    assert [r.get("mute_time_intervals") for r in routes if r["receiver"] == "sms"] == [None, ["business_hours"]]


def test_prometheus_config(promtool):
    sh(promtool, "check", "config", "--syntax-only", DEPLOY / "compose/prometheus/prometheus.yml")


# Compose, Dockerfile, secrets

def test_compose_is_valid_pinned_and_closed():
    compose = yaml.safe_load((DEPLOY / "compose/compose.yaml").read_text())
    jsonschema.validate(compose, COMPOSE)
    home = DEPLOY / "compose"
    for name, s in compose["services"].items():
        tag = s["image"].partition(":")[2]
        assert tag and tag != "latest" and "." not in s["image"].split("/")[0].split(":")[0], name
        assert s["cap_drop"] == ["ALL"] and s["security_opt"], name
        assert s.get("user") or s["image"].startswith("mlops-nb/"), name
        assert set(s.get("secrets", [])) <= compose["secrets"].keys() and set(s.get("depends_on", [])) <= compose["services"].keys()
        for v in s.get("volumes", []):
            source = v["source"] if isinstance(v, dict) else v.partition(":")[0]
            assert source in compose["volumes"] or "${" in source or (home / source).exists(), f"{name}: {source}"
        for key, value in s.get("environment", {}).items():
            assert not re.search(r"PASSWORD$|TOKEN$|SECRET$", key), f"{name}: {key} is written out: {value}"
    for s in compose["services"].values():
        if "build" in s:
            assert (home / s["build"]["context"] / s["build"]["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
            assert f" AS {s['build']['target']}\n" in (DEPLOY / "Dockerfile").read_text()
    assert set(yaml.safe_load((DEPLOY / "compose/prometheus/prometheus.yml").read_text())["scrape_configs"][0]["static_configs"][0]["targets"]) == {"serve:8080"}


def test_no_secret_is_written_anywhere():
    looks_like = re.compile(r"(?i)(-----BEGIN|xox[bp]-|hooks\.slack\.com/services/T|AKIA[0-9A-Z]{16}|://[^/\s:@$]+:[^/\s@$<{]+@|(password|api_key|token|secret)\s*[:=]\s*['\"]?[A-Za-z0-9+/]{12,})")
    for path in (p for p in DEPLOY.rglob("*") if p.is_file() and "secrets" not in p.parts):
        found = looks_like.search(path.read_text())
        assert not found, f"{path}: {found[0][:40]}"
        assert "kind: Secret\nmetadata" not in path.read_text(), path
    assert looks_like.search("postgresql://me:hunter2@db") and looks_like.search("password: abcdefghijkl12")
    assert "secrets/" in (DEPLOY / "compose/.gitignore").read_text().split()


def steps() -> list:
    "Instructions of the Dockerfile: word, rest; continued lines joined, comments left out"
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.M)
    return [tuple(line.split(None, 1)) for line in re.sub(r"\\\n", " ", text).splitlines() if line.strip()]


def stages() -> dict:
    "Stage -> its base and instructions"
    found, now = {}, None
    for word, rest in steps():
        if word == "FROM":
            base, _, now = rest.split()
            found[now] = (base, [])
        else:
            found[now][1].append((word, rest))
    return found


def test_dockerfile_passes_hadolint(programs, tmp_path):
    assert sh(programs / "hadolint", DEPLOY / "Dockerfile") == ""
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN cd / && apt-get install git\n")
    assert "DL3006" in sh(programs / "hadolint", tmp_path / "Dockerfile", ok=False)


def test_dockerfile_is_careful():
    found = stages()
    for name in ("serve", "jobs"):
        base, own = found[name]
        users = [rest for word, rest in own if word == "USER"]
        assert users[-1] == "10001:10001" and [w for w, _ in own].index("USER") > max(i for i, (w, _) in enumerate(own) if w == "COPY")
        assert all(rest.startswith("--from=build-") for word, rest in own if word == "COPY")
    bases = {base for base, _ in found.values()} - found.keys()
    assert bases == {"python:3.12-slim"}
    assert [w for w, _ in found["serve"][1]].count("HEALTHCHECK") == 1
    text = (DEPLOY / "Dockerfile").read_text()
    assert not re.search(r"(?i:^ARG .*(token|password|secret))|https?://(?!127\.0\.0\.1)|--index-url|^ADD ", text, re.M)
    assert all("--require-hashes" in rest or "--no-deps" in rest for word, rest in steps() if word == "RUN" and "pip" in rest and " install" in rest)
    ignore = (ROOT / ".dockerignore").read_text().split("\n")
    assert ignore[1] == "*"
    for word, rest in (s for _, own in found.values() for s in own):
        if word == "COPY" and "--from" not in rest:
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source}" in ignore or any(Path(source).match(p[1:]) for p in ignore if p.startswith("!")), source


@pytest.mark.parametrize("image", tool.EXTRAS)
def test_lists_of_packages_are_in_the_lock_and_complete(image):
    from importlib.metadata import distribution

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    names = set((DEPLOY / f"packages-{image}.txt").read_text().split())
    lock = set(re.findall(r"^([a-z0-9._-]+)==", (ROOT / "requirements.lock").read_text(), re.M))
    assert names <= lock and not names & tool.LEFT_OUT[image]
    import tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    todo = [Requirement(r) for r in [*project["dependencies"], *(r for e in tool.EXTRAS[image] for r in project["optional-dependencies"][e])]]
    seen = set()
    while todo:
        r = todo.pop()
        key = (canonicalize_name(r.name), tuple(sorted(r.extras)))
        if key in seen or key[0] in tool.LEFT_OUT[image] or (r.marker and not r.marker.evaluate({"extra": ""})):
            continue
        seen.add(key)
        assert key[0] in names, f"{key[0]} is not in packages-{image}.txt; run python tools/deploy.py"
        for text in distribution(r.name).requires or []:
            d = Requirement(text)
            if not d.marker or any(d.marker.evaluate({"extra": e}) for e in (*r.extras, "")):
                d.marker = None
                todo.append(d)
    if image == "serve":
        assert not names & {"mlflow", "dvc", "nbdev", "pytest", "jupyterlab", "kubernetes", "matplotlib"}


def let_in(folder: Path) -> Path:
    "What of the repository .dockerignore lets into a build"
    import fnmatch
    lines = (ROOT / ".dockerignore").read_text().split()
    opened, shut = [p[1:] for p in lines if p.startswith("!")], ("__pycache__", ".pyc")
    for path in sh("git", "ls-files", "-co", "--exclude-standard").splitlines():
        if any(fnmatch.fnmatch(path, p) or path.startswith(f"{p}/") for p in opened) and not path.endswith(shut):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, folder / path)
    return folder


def mirror() -> dict:
    "Where this machine has its packages from, and its home"
    index = sh(sys.executable, "-m", "pip", "config", "get", "global.index-url").strip() if "global.index-url" in sh(sys.executable, "-m", "pip", "config", "list") else ""
    return {**({"UV_DEFAULT_INDEX": index} if index else {}), **{k: v for k, v in os.environ.items() if k.startswith(("PIP_", "UV_", "SSL_", "HOME", "LANG"))}}


def build(name: str, context: Path, root: Path) -> dict:
    "Do the steps of a stage and of those it rests on, without a container: paths begin at a folder; users and Debian packages are left out. Its environment, entry and command"
    base, own = stages()[name]
    image = build(base, context, root) if base in stages() else {"env": {"PATH": os.environ["PATH"]}, "dir": root, "ENTRYPOINT": [], "CMD": []}
    here = lambda text: re.sub(r"(?<![\w.])/(opt|src|work|spool|models|etc)\b", lambda m: f"{root}/{m[1]}", text)
    for word, rest in own:
        # what was downloaded for .venv need not be downloaded again, and bytecode is for images that are used more than once
        env = {**{k: v for k, v in image["env"].items() if k not in ("PIP_NO_CACHE_DIR", "UV_NO_CACHE", "UV_COMPILE_BYTECODE")}, "PYTHONDONTWRITEBYTECODE": "1", "PIP_NO_COMPILE": "1"}
        if word == "ENV":
            image["env"] |= {k: re.sub(r"\$(\w+)", lambda m: image["env"].get(m[1], ""), here(v)) for k, _, v in (p.partition("=") for p in rest.split())}
        if word == "WORKDIR":
            image["dir"] = Path(here(rest))
            image["dir"].mkdir(parents=True, exist_ok=True)
        if word == "COPY" and rest.startswith("--from"):
            build(rest.split()[0].partition("=")[2], context, root)
            assert Path(here(rest.split()[1])).exists()
        elif word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                place = image["dir"] / (target if len(sources) == 1 and not target.endswith("/") else Path(source).name)
                (shutil.copytree if (context / source).is_dir() else shutil.copy)(context / source, place)
        if word == "RUN" and not re.match("groupadd|apt-get", rest):
            done = subprocess.run(["sh", "-c", here(rest)], cwd=image["dir"], env={**mirror(), **env}, capture_output=True, text=True)
            assert done.returncode == 0, f"{rest}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
        assert word in ("ARG", "ENV", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "HEALTHCHECK", "CMD", "ENTRYPOINT"), word
        if word in ("CMD", "ENTRYPOINT"):
            image[word] = json.loads(here(rest))
        if word == "HEALTHCHECK":
            image[word] = json.loads(rest.partition("CMD ")[2])
    return image


@pytest.mark.drill
def test_the_steps_of_the_server_image_make_a_server_that_answers(tmp_path):
    import numpy as np
    import pandas as pd
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from mlops_nb.packaging import package
    from mlops_nb.rollout.processes import free_port
    from mlops_nb.serving.auth import add_key
    root = tmp_path / "image"
    image = build("serve", let_in(tmp_path / "context"), root)
    for folder in ("work", "spool", "models", "etc/mlops-nb/keys"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    x = pd.DataFrame({"a": np.arange(80.0), "b": np.arange(80.0) % 7})
    package(make_pipeline(StandardScaler(), LogisticRegression()).fit(x, np.where(x.a > 40, "late", "on time")), root / "models/bundle", name="flights", sample=x)
    key = add_key(root / "etc/mlops-nb/keys/keys.yaml", "test", None, None, None)
    port = str(free_port())
    command = [w.replace("8080", port).replace("0.0.0.0", "127.0.0.1") for w in [*image["ENTRYPOINT"], *image["CMD"]]]
    command[command.index("--linger") + 1] = "0"
    env = {**image["env"], "MODEL_VERSION": "7", "HOME": str(tmp_path), "MLOPS_NB_LOG_URL": f"sqlite:///{root}/work/log.db"}
    assert shutil.which(command[0], path=env["PATH"]) == f"{root}/opt/venv/bin/mlops-nb"
    sh(f"{root}/opt/venv/bin/python", "-c", "import mlops_nb, sys; assert sys.prefix in mlops_nb.__file__", cwd=root)
    with open(tmp_path / "server.log", "w") as log:
        server = subprocess.Popen(command, cwd=image["dir"], env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        check = [w.replace("8080", port) for w in image["HEALTHCHECK"]]
        until(lambda: server.poll() is not None or subprocess.run(check, env=env, capture_output=True).returncode == 0)
        assert server.poll() is None, (tmp_path / "server.log").read_text()
        ask = lambda path, body=None: urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=body, headers={"x-api-key": key}), timeout=300).read().decode()
        assert json.loads(ask("/ready"))["ready"]
        told = json.loads(ask("/v1/models/flights:predict", b'{"instances": [{"a": 70, "b": 1}, {"a": 3, "b": 2}]}'))
        assert told["predictions"] == ["late", "on time"]
        assert 'model_predictions_total{model_name="flights",model_version="7",prediction_class="late"} 1.0' in ask("/metrics")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=300)
    finally:
        server.terminate()
        assert server.wait(180) == 0, (tmp_path / "server.log").read_text()
    import sqlite3
    with sqlite3.connect(root / "work/log.db") as log:
        assert {r[0] for r in log.execute("select model_version from predictions")} == {"7"}
    assert not [p for p in (root / "opt/venv").rglob("mlflow")]
