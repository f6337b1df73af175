"""Bars are drawn on terminals and in notebooks, and nowhere else: ours, and those of transformers."""

import io
import os
import pty
import subprocess
import sys
import types

import pytest
import transformers

from rmtension import NeuronAttribution, RewardHead
from rmtension._progress import is_watched, progress_bar, shows_bars, without_unseen_bars
from rmtension.attribution._faithfulness import faithfulness


class Terminal(io.StringIO):
    def isatty(self):
        return True


def notebook():
    """What IPython looks like from inside a kernel."""
    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    return types.SimpleNamespace(get_ipython=lambda: shell)


def everything(head, pairs):
    """What draws bars."""
    head.score(["how do i bake"], progress=True)
    head.score_pairs(pairs, progress=True)
    attribution = NeuronAttribution(head, method="gradient_x_activation")
    list(attribution.per_token(pairs, progress=True))
    faithfulness(head, pairs, attribution.score(pairs, progress=True), sample=3, set_fractions=(0.1,), progress=True)


def test_without_a_terminal_there_are_no_bars(head, pairs, capsys, monkeypatch):
    everything(head, pairs[:2])
    assert capsys.readouterr() == ("", "")
    # Negative control: on a terminal they are there, each by its name.
    monkeypatch.setattr(sys, "stderr", Terminal())
    everything(head, pairs[:2])
    drawn = sys.stderr.getvalue()
    for name in ("score", "gradient_x_activation", "ablate", "ablate sets"):
        assert f"{name}: " in drawn


def test_bars_need_a_terminal_or_a_notebook(monkeypatch):
    assert not is_watched()
    monkeypatch.setattr(sys, "stderr", None)
    assert not is_watched()
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert is_watched()
    assert shows_bars(True)
    assert not shows_bars(False)
    assert progress_bar(range(3), progress=False).disable
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setitem(sys.modules, "IPython", notebook())
    assert is_watched()
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: None))
    assert not is_watched()


@pytest.fixture
def talking():
    """transformers with its bars on, as it is outside of this suite."""
    transformers.logging.enable_progress_bar()
    yield
    transformers.logging.disable_progress_bar()


def test_without_a_terminal_transformers_draws_no_bars(checkpoints, tmp_path, talking, capfd):
    head = RewardHead.from_pretrained(checkpoints["llama"])
    head.save_pretrained(tmp_path / "saved")
    head.check()
    assert capfd.readouterr() == ("", "")
    assert transformers.logging.is_progress_bar_enabled(), "as it was"
    with without_unseen_bars():
        assert not transformers.logging.is_progress_bar_enabled()
    # Negative control.
    transformers.AutoModelForSequenceClassification.from_pretrained(checkpoints["llama"])
    assert "Loading weights" in capfd.readouterr().err


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals")
def test_bars_are_drawn_on_a_terminal_and_not_in_a_pipe():
    """In a process of its own, whose stderr is a terminal; then the same with a pipe."""
    code = """if True:
        from rmtension._progress import progress_bar
        for _ in progress_bar("abc", progress=True, desc="seen", ncols=60, nrows=20):
            pass
    """
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True)
    drawn = os.read(ours, 10_000)
    os.close(theirs)
    os.close(ours)
    assert b"seen:" in drawn
    assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, check=True).stderr == b""
