"The site: all notebooks and modules have their page, and no link inside it leads nowhere."
import re
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.drill, pytest.mark.soak]


def test_the_site_is_made_without_a_warning(root):
    done = subprocess.run([sys.executable, "tools/docs.py", "-W", "--keep-going"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    html = root / "_docs/html"
    names = {p.relative_to(root).with_suffix(".html") for p in (root / "nbs").rglob("*.ipynb") if p.name != "index.ipynb" and ".ipynb_checkpoints" not in p.parts}
    assert not [n for n in names if not (html / n).exists()]
    page = (html / "api/mlops_nb.drift.detect.html").read_text()
    assert "Effect size above which a change matters" in re.sub(r"<[^>]+>", "", page)        # the comments beside parameters are there
