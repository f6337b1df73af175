"""Dashboards of single neurons: what they read and write, what ablating them does, and where they are active."""

from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

import pandas as pd

from rmtension.attribution._dashboard_data import ActiveText, DashboardData, NeuronExample
from rmtension.attribution._dashboard_page import page_html
from rmtension.attribution._dashboards_json import dashboards_to_json, read_dashboards
from rmtension.store._files import write_text

_FRAMES = ("table", "scatter", "distribution", "correlated", "tokens", "descriptions")
# The height of the frame in a notebook, in pixels.
_HEIGHT = 760


@dataclass(frozen=True, eq=False, repr=False)
class NeuronDashboards(DashboardData):
    """The dashboards of some neurons of one model; `neuron_dashboards` returns them, a notebook shows them.

    - `table` has one row per neuron asked for (`set` is "asked for") and per random control neuron ("random"), with
      columns `<group>_score`, `_score_stderr`, `_effect`, `_effect_low`, `_effect_high` and `_n`, and `direct_weight`:
      the output column of the neuron after the final norm's gain, times the row of the reward head. At the token that
      the reward is read from, activation x `direct_weight` / sigma is the neuron's direct contribution to the reward
      (`direct_contributions`), where sigma is what the final norm divides by. NaN where a neuron has no such weight;
      `about["no_weights"]` says why.
    - `scatter` has the scores of all neurons, or of a random part of them.
    - `distribution` is a histogram of each neuron's largest activation (in magnitude) per text.
    - `correlated` has the neurons whose activations correlate most with each neuron's over all tokens (Pearson).
    - `tokens` has the tokens whose logits each neuron promotes and suppresses most, per unit of activation and times
      sigma, relative to the mean over the vocabulary; empty for a model without an unembedding (`about["no_tokens"]`).
    - `descriptions` is empty until `describe_dashboards` adds each neuron's description with its score on held-out
      texts, or the reason why it has none.
    - `examples` holds the pairs with the largest activation.
    - `about` names the model, site, pairs and method; `about["sign"]` tells what a positive score means.

    Examples:
        >>> from rmtension.attribution import neuron_dashboards
        >>> dashboards = neuron_dashboards(head, neurons, pairs, n_examples=1, progress=False)
        >>> dashboards
        NeuronDashboards(2 mlp neurons of gpt2-2x24-heads2x12-d24; 24 helpful, 24 harmless)
        >>> dashboards.to_frame()[["set", "layer", "helpful_effect"]].round(1)
                 set  layer  helpful_effect
        0  asked for      0            -1.0
        1  asked for      1            -1.0
        2     random      0            -0.6
        3     random      1             0.0
        >>> dashboards.save_html("neurons.html")
        >>> dashboards.save("neurons.json")
        >>> NeuronDashboards.load("neurons.json").neurons == dashboards.neurons
        True
    """

    def __repr__(self) -> str:
        pairs = ", ".join(f"{n} {name}" for name, n in self.about["pairs"].items())
        where = f"{self.about['site']} neurons of {self.about['architecture']}"
        return f"NeuronDashboards({len(self.neurons)} {where}; {pairs})"

    def _repr_html_(self) -> str:
        # A frame keeps the page's style and script apart from the notebook's, and its own policy applies in it.
        page = escape(page_html(self), quote=True)
        return (
            f'<p>{escape(repr(self))}</p>\n<iframe srcdoc="{page}" sandbox="allow-scripts" width="100%" '
            f'height="{_HEIGHT}" title="Neuron dashboards"></iframe>'
        )

    def to_frame(self) -> pd.DataFrame:
        """A copy of `table`."""
        return self.table.copy()

    def save_html(self, path: str | Path) -> None:
        """Write the dashboards as one HTML file that loads nothing: its style, script and texts are inside.

        Texts of the data are escaped, and a Content-Security-Policy prevents the page from loading anything and from
        running other scripts than its own. `n_examples=0` leaves texts out.
        """
        write_text(Path(path), page_html(self), "neuron dashboards")

    def save(self, path: str | Path) -> None:
        """Write everything to one JSON file."""
        frames = {name: getattr(self, name) for name in _FRAMES}
        text = dashboards_to_json(frames, [asdict(example) for example in self.examples], self.about)
        write_text(Path(path), text, "neuron dashboards")

    @classmethod
    def load(cls, path: str | Path) -> "NeuronDashboards":
        """Read a file that `save` wrote; raises `StorageError` for any other file."""
        frames, examples, about = read_dashboards(Path(path))
        read = (
            NeuronExample(**fields | {side: ActiveText(**fields[side]) for side in ("chosen", "rejected")})
            for fields in examples
        )
        return cls(**frames, examples=tuple(read), about=about)
