"""`python -m benchmarks` (`make bench`): the measurement that fits this machine, into benchmarks/results/.

On a GPU the forward of one branch against cuDNN (`benchmarks.floor`), else whole workloads on the CPU
(`benchmarks.cpu`). Each module runs alone too and says how.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> int:
    """Run it in a process of its own, as its result file says to."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name().lower().replace(" ", "-")
        return subprocess.call([sys.executable, "-m", "benchmarks.floor", str(RESULTS / f"floor_{name}.json")])
    return subprocess.call([sys.executable, "-m", "benchmarks.cpu"])


if __name__ == "__main__":
    sys.exit(main())
