"""Whether all files that name the version of a release agree.

    python tests/programs/release.py v0.2.0

compares the tag (by default, that of the checked-out commit) with `pyproject.toml`, `CITATION.cff` and the newest entry
of `CHANGELOG.md`, which must have a date. It prints what differs, and then exits with 1.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def versions(root):
    """The version in each file, and the text in brackets after the newest version of the changelog."""
    changelog = re.search(r"^## (\S+) \((.+)\)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = re.search(r"^version: (\S+)$", (root / "CITATION.cff").read_text(), re.MULTILINE)
    by_file = {
        "pyproject.toml": tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"],
        "CITATION.cff": citation and citation[1],
        "CHANGELOG.md": changelog and changelog[1],
    }
    return by_file, changelog and changelog[2]


def problems(root, tag):
    """Messages about what prevents a release as `tag`."""
    by_file, when = versions(root)
    messages = [f"{name} has {version}, the tag is {tag}" for name, version in by_file.items() if f"v{version}" != tag]
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", when or ""):
        messages.append(f"CHANGELOG.md: expected the date of its newest version, got ({when})")
    return messages


def tag_here():
    """The tag of the commit that is checked out, or None."""
    asked = ["git", "-C", str(ROOT), "describe", "--tags", "--exact-match"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or None


if __name__ == "__main__":
    tag = sys.argv[1] if len(sys.argv) > 1 else tag_here()
    wrong = ["tag: the commit has no tag. Pass the tag, or create it with git."] if tag is None else problems(ROOT, tag)
    print("\n".join(wrong) or f"{tag}: all files have this version")
    sys.exit(bool(wrong))
