"""`python -m benchmarks` (`make bench`): the measurement that fits this machine, into benchmarks/results/.

On a GPU the forward of one branch against cuDNN (`benchmarks.floor`), else whole workloads on the CPU
(`benchmarks.cpu`). Each module runs alone too and says how.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from dilated_attention_pytorch import device

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> int:
    """Run it in a process of its own, as its result file says to."""
    gpu = device.current()
    if gpu is not None:
        return subprocess.call([sys.executable, "-m", "benchmarks.floor", str(RESULTS / f"floor_{gpu.name}.json")])
    return subprocess.call([sys.executable, "-m", "benchmarks.cpu"])


if __name__ == "__main__":
    sys.exit(main())
