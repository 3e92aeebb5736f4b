"""Requests a second of one server process, one row of JSON a request, by wrk at 1, 16 and 64 connections; ours with validation, metrics and log on.

    .venv/bin/python benchmarks/serving.py [SECONDS] [NAME …]        (default 5 seconds a point, all servers)
    .venv/bin/python benchmarks/serving.py soak [MINUTES]            (default 10: memory of ours under load, minute by minute)

The same gradient boosting pipeline (12 numbers, 4 categories) behind every server; peers in environments of their own (tools/peers.py). The limits
(hello, bare) and ours are measured at the beginning and at the end, to see what the machine's mood was worth. "with ours" is a peer that was given our
compiled model: what remains is the server. "bare" asks the model for each request by itself, as ours does for one that is alone; those that come together
share a call and a write of ours. "half" is 16 connections that ask at half of the rate they reached, by pauses. Two workers are measured where there are at
least four cores, so that wrk has its own. Needs wrk. Writes benchmarks/results/serving.json.
"""
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from unittest import mock

import common

sys.path[:0] = [str(common.ROOT / "benchmarks/peers"), str(common.ROOT / "tests")]
import model  # noqa: E402
import peers  # noqa: E402
from servers import free_port  # noqa: E402

FLIGHTS = common.ROOT / "artifacts/bundle"
HERE, BIN = common.ROOT / "benchmarks/peers", Path(sys.executable).parent
ROW = model.table(1)[0].iloc[0].to_dict()
V1 = ("/v1/models/m:predict", {"instances": [ROW]})
V2 = ("/v2/models/m/infer", {"inputs": [{"name": c, "shape": [1], "datatype": "FP64" if c[0] == "n" else "BYTES", "data": [v]} for c, v in ROW.items()]})


def prepare(folder: Path) -> None:
    "The model in all the forms that the servers want"
    import mlflow
    from mlops_nb.core import MlopsError
    from mlops_nb.packaging import package
    from mlops_nb.validation import Schema
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType, StringTensorType
    frame, _ = model.table()
    fitted = model.fitted()
    bundle = package(fitted, folder / "bundle", name="m", sample=frame, schema=Schema.infer(frame))
    assert bundle.compiled, bundle.proof
    with mock.patch("mlops_nb.packaging.build.compile_model", side_effect=MlopsError("left out")):
        package(fitted, folder / "uncompiled", name="m", sample=frame)
    kinds = [(c, FloatTensorType([None, 1]) if c[0] == "n" else StringTensorType([None, 1])) for c in frame]
    (folder / "whole.onnx").write_bytes(to_onnx(fitted, initial_types=kinds, options={"zipmap": False}).SerializeToString())
    mlflow.sklearn.save_model(fitted, str(folder / "mlflow"), input_example=frame.head(2), serialization_format="cloudpickle")
    (folder / "mlserver").mkdir()
    (folder / "mlserver/model-settings.json").write_text(json.dumps({"name": "m", "implementation": "mlserver_model.Served"}))


def commands(folder: Path, port: int) -> dict:
    "Name -> command, path and body, variables"
    ours = lambda name: [BIN / "mlops-nb", "serve", "--model", folder / name, "--port", port]
    hand = lambda name, env=None: [peers.python_of(env) if env else sys.executable, HERE / "served.py", name, port, folder]
    of = lambda env, tool: Path(peers.python_of(env)).parent / tool
    (folder / "mlserver/settings.json").write_text(json.dumps({"parallel_workers": 0, "http_port": port, "host": "127.0.0.1", "grpc_port": free_port(), "metrics_port": free_port()}))
    return {
        "hello": (hand("hello"), *V1), "bare": (hand("bare"), *V1), "ours": (ours("bundle"), *V1), "ours, V2": (ours("bundle"), *V2),
        "FastAPI + our compiled model": (hand("fastapi_compiled"), *V1), "FastAPI + ONNX": (hand("fastapi_onnx"), *V1),
        "ours, not compiled": (ours("uncompiled"), *V1), "FastAPI + pipeline": (hand("fastapi_pipeline"), *V1),
        "MLflow": ([BIN / "mlflow", "models", "serve", "-m", folder / "mlflow", "-p", port, "--env-manager", "local", "--workers", "1"], "/invocations", {"dataframe_records": [ROW]}),
        "BentoML": ([of("bentoml", "bentoml"), "serve", "bento:Plain", "--port", port], "/predict", {"instances": [ROW]}),
        "BentoML, batching": ([of("bentoml", "bentoml"), "serve", "bento:Batched", "--port", port], "/predict", {"instances": [ROW]}),
        "MLServer": ([of("mlserver", "mlserver"), "start", folder / "mlserver"], *V2), "KServe": (hand("kserve", "kserve"), *V1),
        "BentoML with ours": ([of("bentoml", "bentoml"), "serve", "bento:Plain", "--port", port], "/predict", {"instances": [ROW]}),
        "MLServer with ours": ([of("mlserver", "mlserver"), "start", folder / "mlserver"], *V2), "KServe with ours": (hand("kserve", "kserve"), *V1),
        **({"ours, 2 workers": ([*ours("bundle"), "--workers", 2], *V1)} if os.cpu_count() >= 4 else {}),
        **({"ours, flights": ([BIN / "mlops-nb", "serve", "--model", FLIGHTS, "--port", port], "/v1/models/flights:predict", {"instances": [json.loads((FLIGHTS / "input_example.json").read_text())]})}
           if FLIGHTS.is_dir() else {}),
        "hello again": (hand("hello"), *V1), "bare again": (hand("bare"), *V1), "ours again": (ours("bundle"), *V1)}


def family(pid: int) -> list[int]:
    "A process and all it started"
    parents = {}
    for p in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            parents.setdefault(int((p / "stat").read_text().rpartition(")")[2].split()[1]), []).append(int(p.name))
    return [pid, *(q for child in parents.get(pid, []) for q in family(child))]


def memory(pid: int) -> int:
    "Megabytes that a server and its processes hold alone or share in proportion (PSS)"
    total = 0
    for p in family(pid):
        with contextlib.suppress(OSError):
            total += int(re.search(r"Pss:\s+(\d+)", Path(f"/proc/{p}/smaps_rollup").read_text())[1])
    return total >> 10


def by_wrk(url: str, script: Path, connections: int, seconds: float) -> dict:
    "What wrk says"
    out = subprocess.run(["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "30s", "--latency", "-s", script, url], capture_output=True, text=True, check=True).stdout
    unit = {"us": 1e-3, "ms": 1, "s": 1e3, "m": 6e4}
    centile = lambda p: round(float((m := re.search(rf"{p}%\s+([\d.]+)(us|ms|s|m)", out))[1]) * unit[m[2]], 3)
    failed = sum(int(n) for n in re.findall(r"Non-2xx or 3xx responses: (\d+)", out)) + sum(int(n) for n in re.findall(r"(?:connect|read|write|timeout) (\d+)", out))
    return {"per_second": round(float(re.search(r"Requests/sec:\s+([\d.]+)", out)[1]), 1), "p50_ms": centile(50), "p99_ms": centile(99), "failed": failed}


def paused(script: Path, peak: dict) -> Path:
    "The script with pauses, so that 16 connections ask at half of the rate of `peak`"
    pause = max(0, 2 * 16 / peak["per_second"] * 1000 - peak["p50_ms"] / 2)
    half = script.with_name("half.lua")
    half.write_text(f"{script.read_text()}function delay() return {round(pause)} end\n")
    return half


@contextlib.contextmanager
def started(command: list, path: str, body: dict, folder: Path, port: int, compiled: bool = False):
    "A server that has given its first answer: its URL, wrk's script, its process, the seconds it took; what it printed when it does not start"
    here, data = Path(tempfile.mkdtemp(dir=folder)), json.dumps(body)
    (here / "post.lua").write_text(f"wrk.method='POST'\nwrk.headers['Content-Type']='application/json'\nwrk.body=[==[{data}]==]\n")
    variables = {**os.environ, "PYTHONPATH": f"{HERE}:{common.ROOT}" if compiled else str(HERE), "PATH": f"{BIN}:{os.environ['PATH']}", "BENTOML_DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1",
                 "MLFLOW_TRACKING_URI": f"sqlite:///{here}/m.db", **({"BUNDLE": str(folder / "bundle")} if compiled else {})}
    start = time.monotonic()
    process = subprocess.Popen([str(c) for c in command], cwd=here if "serve" not in map(str, command) or "--model" in map(str, command) else HERE, env=variables, start_new_session=True,
                               stdout=(here / "out").open("w"), stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}{path}"
    try:
        while True:
            if process.poll() is not None or time.monotonic() - start > 120:
                raise RuntimeError((here / "out").read_text()[-300:])
            with contextlib.suppress(OSError):
                urllib.request.urlopen(urllib.request.Request(url, data.encode(), {"content-type": "application/json"}), timeout=20).read()
                break
            time.sleep(0.02)
        yield url, here / "post.lua", process, time.monotonic() - start
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)


def measured(command: list, path: str, body: dict, port: int, folder: Path, seconds: float, compiled: bool = False) -> dict:
    "Load a server with 1, 16 and 64 connections, and at half of what 16 reach"
    try:
        with started(command, path, body, folder, port, compiled) as (url, script, process, boot):
            by_wrk(url, script, 4, 1)
            found = {f"c{c}": by_wrk(url, script, c, seconds) for c in (1, 16, 64)}
            found["half"] = by_wrk(url, paused(script, found["c16"]), 16, seconds)
            return {**found, "boot_s": round(boot, 1), "pss_mb": memory(process.pid)}
    except RuntimeError as e:
        return {"failed to start": str(e)}


def bare_import() -> float:
    "Seconds that Python takes to import what our server needs of others, the best of three"
    def once() -> float:
        start = time.monotonic()
        subprocess.run([sys.executable, "-c", "import numpy, yaml, pydantic, msgspec, onnxruntime, prometheus_client, uvicorn, uvloop, httptools, fastapi"], check=True)
        return time.monotonic() - start
    return min(once() for _ in range(3))


def soak(minutes: int) -> None:
    "Load ours with 16 connections and look at its memory every minute"
    folder = Path(tempfile.mkdtemp(prefix="serving-"))
    prepare(folder)
    port = free_port()
    with started(*commands(folder, port)["ours"], folder, port) as (url, script, process, _):
        seen = []
        for _ in range(minutes):
            seen.append({**by_wrk(url, script, 16, 60), "pss_mb": memory(process.pid)})
            print(seen[-1], flush=True)
    shutil.rmtree(folder)
    common.save("serving_soak", {"command": f"python benchmarks/serving.py soak {minutes}", "machine": common.machine("uvicorn", "onnxruntime"), "minutes": seen})


def main() -> None:
    if sys.argv[1:2] == ["soak"]:
        return soak(int(sys.argv[2]) if len(sys.argv) > 2 else 10)
    seconds, only = float(sys.argv[1]) if len(sys.argv) > 1 else 5, sys.argv[2:]
    if not shutil.which("wrk"):
        sys.exit("wrk is not installed; apt-get install wrk")
    folder = Path(tempfile.mkdtemp(prefix="serving-"))
    prepare(folder)
    servers = {}
    for name in list(commands(folder, 1)):
        if only and name not in only:
            continue
        port = free_port()
        servers[name] = found = measured(*commands(folder, port)[name], port, folder, seconds, name.endswith("with ours"))
        print(f"{name:30}", *(f"{k}: {v['per_second']:>8,.0f}/s p50 {v['p50_ms']:>7.2f} p99 {v['p99_ms']:>8.2f} ms failed {v['failed']:>3}" if isinstance(v, dict) else f"{k} {v}" for k, v in found.items()), sep="  ", flush=True)
    shutil.rmtree(folder)
    rate = {n: f["c16"]["per_second"] for n, f in servers.items() if "c16" in f}
    mine = [rate[n] for n in ("ours", "ours again") if n in rate]
    best = lambda name: max(rate[n] for n in (name, f"{name} again") if n in rate)
    ratios = {n: round(max(mine) / best(n), 2) for n in rate if not n.startswith("ours") and not n.endswith("again")} if mine else {}
    if {"ours, not compiled", "BentoML, batching"} <= rate.keys():
        ratios["not compiled / BentoML, batching"] = round(rate["ours, not compiled"] / rate["BentoML, batching"], 2)
    print("at 16 connections, ours over:", ratios)
    imports = round(bare_import(), 2)
    print(f"bare import of the server's dependencies: {imports} s")
    if not only:
        common.save("serving", {"command": "python benchmarks/serving.py", "seconds": seconds, "machine": common.machine("uvicorn", "onnxruntime", "fastapi", "mlflow"), "bare_import_s": imports, "servers": servers, "ours over, at 16 connections": ratios})


if __name__ == "__main__":
    main()
