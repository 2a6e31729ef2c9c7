"""Say what this interpreter lacks: `python .ci/need.py torch pytest`. For environments that make did not set up."""

import sys
from importlib.util import find_spec

INSTALLED_AS = {"yaml": "pyyaml", "xdist": "pytest-xdist"}

missing = [INSTALLED_AS.get(name, name) for name in sys.argv[1:] if find_spec(name) is None]
if missing:
    sys.exit(
        f"{sys.executable} has torch, so it is used as it is, but it lacks {', '.join(missing)}. Either\n"
        f"  {sys.executable} -m pip install {' '.join(missing)}\n"
        "or leave the environment (deactivate, no PYTHON=), and make sets up .venv"
    )
