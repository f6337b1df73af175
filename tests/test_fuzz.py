"""A few inputs for each surface, and those that once failed; `tests/programs/fuzz.py` runs hundreds of thousands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from documented import limited
from fuzz import SURFACES, TooLong, outcome


@pytest.mark.grid
def test_fuzzed_inputs_are_read_or_refused():
    """As users have it: without the type checker that this suite runs under. Most are refused, some are read."""
    script = Path(__file__).parent / "programs" / "fuzz.py"
    ran = subprocess.run([sys.executable, str(script), "--n", "400"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.findall(r"^(\w+): 400 inputs", ran.stdout, re.MULTILINE) == list(SURFACES)
    assert len(re.findall(r"^\s+\d+ read$", ran.stdout, re.MULTILINE)) == len(SURFACES)
    assert "inputs that failed before and fail now: 0" in ran.stdout


class Broken:
    """A surface that lets something else through, or never ends."""

    def __init__(self, error):
        self.error = error

    def read(self, content):
        if self.error is not None:
            raise self.error
        while True:
            pass


def test_a_crash_is_reported():
    with pytest.raises(ZeroDivisionError):
        outcome(Broken(ZeroDivisionError()), b"")
    with pytest.raises(TooLong), limited(0.05, "an input", TooLong):
        Broken(None).read(b"")
