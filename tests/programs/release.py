"""Whether one version stands everywhere that a release names it.

    python tests/programs/release.py v0.2.0

compares the tag (left out: the one that the checked-out commit carries) with `pyproject.toml`, `CITATION.cff` and the
newest entry of `CHANGELOG.md`, which has to be dated; ends with 1 and says what differs.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def versions(root):
    """The version by each file, and what stands behind the newest one of the changelog."""
    changelog = re.search(r"^## (\S+) \((.+)\)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = re.search(r"^version: (\S+)$", (root / "CITATION.cff").read_text(), re.MULTILINE)
    found = {
        "pyproject.toml": tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"],
        "CITATION.cff": citation and citation[1],
        "CHANGELOG.md": changelog and changelog[1],
    }
    return found, changelog and changelog[2]


def problems(root, tag):
    """What keeps this from being released as `tag`, in words."""
    found, when = versions(root)
    said = [f"{name} has {version}, the tag is {tag}" for name, version in found.items() if f"v{version}" != tag]
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", when or ""):
        said.append(f"CHANGELOG.md has ({when}) where the date of its newest version stands")
    return said


def tag_here():
    """The tag of the commit that is checked out, or None."""
    asked = ["git", "-C", str(ROOT), "describe", "--tags", "--exact-match"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or None


if __name__ == "__main__":
    tag = sys.argv[1] if len(sys.argv) > 1 else tag_here()
    wrong = ["no tag: the commit carries none"] if tag is None else problems(ROOT, tag)
    print("\n".join(wrong) or f"{tag}: one version everywhere")
    sys.exit(bool(wrong))
