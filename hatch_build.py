"""Build hook: a wheel carries generated/ and tune_db/ inside the package; an editable install reads the checkout."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ArtifactsHook(BuildHookInterface[Any]):
    """Found by hatchling, which looks for a build hook in a file of this name."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """`version` is "standard" or "editable"."""
        if self.target_name == "wheel" and version == "standard":
            for pattern in ("generated/*.py", "tune_db/**/*.yaml", "tune_db/README.md"):  # no lock, no cache
                for path in sorted(Path(self.root).glob(pattern)):
                    inside = path.relative_to(self.root).as_posix()
                    build_data["force_include"][str(path)] = f"dilated_attention_pytorch/_artifacts/{inside}"
