"""Build hook: a wheel carries generated/ and tune_db/ inside the package; an editable install reads the checkout."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ArtifactsHook(BuildHookInterface[Any]):
    """Found by hatchling, which looks for a build hook in a file of this name."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """`version` is "standard" or "editable"."""
        if self.target_name == "wheel" and version == "standard":
            for folder in ("generated", "tune_db"):
                inside = f"dilated_attention_pytorch/_artifacts/{folder}"
                build_data["force_include"][str(Path(self.root, folder))] = inside
