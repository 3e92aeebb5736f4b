"The entries of requirements.lock, hashes included, whose names are in a list: python locked.py LOCK LIST"
import re
import sys
from pathlib import Path

wanted = set(Path(sys.argv[2]).read_text().split())
entries = re.split(r"^(?=\S)", Path(sys.argv[1]).read_text(), flags=re.M)[1:]
print("".join(e for e in entries if e.partition("==")[0] in wanted), end="")
if missing := wanted - {e.partition("==")[0] for e in entries}:
    sys.exit(f"{sys.argv[1]} has no {', '.join(sorted(missing))}")
