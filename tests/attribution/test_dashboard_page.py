"""The page of neuron dashboards: it loads nothing, shows every most active token, and data never becomes markup."""

import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from tiny_models import make_pairs

from rmtension import NeuronSet, PreferencePairs
from rmtension.attribution import NeuronDashboards, neuron_dashboards
from rmtension.attribution._dashboard_data import ActiveText
from rmtension.attribution._dashboard_words import number, number_with_interval, page_text, shown_token

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> &amp;"


class Page(HTMLParser):
    """The elements of a page with their attributes, and the text of its scripts and styles."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.within, self.text, self.words = [], None, {}, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.within = tag if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self.within = None

    def handle_data(self, data):
        if self.within:
            self.text.setdefault(self.within, []).append(data)
        else:
            self.words.append(data)


@pytest.fixture(scope="module")
def dashboards(head):
    """Twenty neurons with five pairs each: of long texts, with special tokens, white space and hostile texts."""
    rows = [
        pair.to_dict()
        | {
            "prompt": pair.prompt + " how do i bake\t cake" * (number % 3),
            "chosen": HOSTILE if number % 6 == 1 else pair.chosen + "\n\n python  process" * (number % 5) + "<eos>",
            "id": f"{HOSTILE}{number}",
        }
        for number, pair in enumerate(make_pairs(30))
    ]
    pairs = PreferencePairs.from_records(rows)
    indices = [(layer, 3 * neuron + layer) for layer in range(3) for neuron in range(7)][:20]
    neurons = NeuronSet.from_indices(indices, shape=(3, 64), site="mlp", architecture=head.architecture)
    return neuron_dashboards(head, neurons, {f"<b>{HOSTILE}": pairs}, n_examples=5, progress=False)


@pytest.fixture(scope="module")
def page(dashboards, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "neurons.html"
    dashboards.save_html(path)
    return path.read_text(encoding="utf-8")


def examples_of(page):
    return json.loads(Page(page).text["script"][0])


def test_in_100_of_100_examples_the_most_active_token_is_shown(dashboards, page):
    listed = [example for of_neuron in examples_of(page).values() for example in of_neuron]
    assert len(listed) == len(dashboards.examples) == 100
    seen = folded = 0
    for example, shown in zip(dashboards.examples, listed, strict=True):
        for side in ("chosen", "rejected"):
            text, on_page = getattr(example, side), shown[side]
            start, end = on_page["window"]
            activations = [abs(activation) for activation in text.activations]
            peak = activations.index(max(activations))
            assert activations[text.peak] == activations[peak], "the page outlines the most active token"
            assert start <= on_page["peak"] < end, "it is outside what is folded"
            # Every token shows something, also one without any character.
            assert on_page["tokens"][text.peak].strip()
            folded += start > 0 or end < len(text.tokens)
        seen += 1
    assert seen == 100
    assert folded > 20, "texts that are folded show that folding keeps it"


def test_without_the_window_the_peak_would_be_folded(dashboards):
    """Negative control: the first tokens of a text often do not have it."""
    shown = [page_text(getattr(example, side)) for example in dashboards.examples for side in ("chosen", "rejected")]
    assert any(one["peak"] >= 41 for one in shown)
    assert all(one["window"][1] - one["window"][0] <= 56 for one in shown)


def test_the_page_loads_nothing_and_runs_only_its_own_script(page):
    parsed = Page(page)
    metas = [attributes for tag, attributes in parsed.elements if tag == "meta"]
    (policy,) = (attributes["content"] for attributes in metas if attributes.get("http-equiv"))
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert [attributes for tag, attributes in parsed.elements if tag == "script"] == [
        {"type": "application/json", "id": "neuron-texts"},
        {},
    ]
    for kind in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(parsed.text[kind][-1].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    for tag, attributes in parsed.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        for name in ("src", "href", "action", "data", "srcset"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes[name])
    assert not {"link", "img", "iframe", "b"} & {tag for tag, _ in parsed.elements}
    assert not re.search(r"@import|url\(", parsed.text["style"][-1])
    assert "alert(1)</script>" not in page
    assert f"<b>{HOSTILE}" in "".join(parsed.words), "the name of the group is text"
    assert any(example["pair"].startswith(HOSTILE) for shown in examples_of(page).values() for example in shown)


def test_a_notebook_shows_the_page_in_a_frame(dashboards, page):
    shown = dashboards._repr_html_()
    ((tag, attributes),) = [element for element in Page(shown).elements if element[0] == "iframe"]
    assert (tag, attributes["sandbox"]) == ("iframe", "allow-scripts")
    assert attributes["srcdoc"] == page
    assert html.escape(repr(dashboards)) in shown


def test_a_colour_means_one_thing(page):
    """Orange and blue are the sign of an activation: in texts, in histograms and in the legend, and nowhere else."""
    style = re.sub(r"/\*.*?\*/", "", Page(page).text["style"][-1])
    coloured = [rule for rule in re.findall(r"([^{}]+)\{([^{}]*)\}", style) if "var(--positive)" in rule[1]]
    assert all("positive" in selector for selector, _ in coloured)
    coloured = [rule for rule in re.findall(r"([^{}]+)\{([^{}]*)\}", style) if "var(--negative)" in rule[1]]
    assert all("negative" in selector for selector, _ in coloured)


def test_names_are_those_of_transformer_circuits(dashboards, page):
    names = [f"L{layer} N{neuron}" for layer, neuron in dashboards.neurons]
    assert list(examples_of(page)) == names
    assert re.findall(r'<h3 tabindex="-1">([^<]*)</h3>', page) == names


def test_attention_heads_are_called_heads(head):
    neurons = NeuronSet.from_indices([(2, 1)], shape=(3, 4), site="attn_head", architecture=head.architecture)
    shown = neuron_dashboards(head, neurons, {"x": make_pairs(6)}, n_examples=1, progress=False)
    assert shown.table["direct_weight"].isna().all()
    assert '<h3 tabindex="-1">L2 H1</h3>' in html.unescape(shown._repr_html_())
    assert "none: an attention head writes one direction for each of its channels" in shown._repr_html_()


def test_a_saved_file_writes_the_same_page(dashboards, page, tmp_path):
    dashboards.save(tmp_path / "neurons.json")
    NeuronDashboards.load(tmp_path / "neurons.json").save_html(tmp_path / "neurons.html")
    assert (tmp_path / "neurons.html").read_text(encoding="utf-8") == page


def test_white_space_and_special_tokens_are_visible(dashboards, page):
    tokens = {
        token for shown in examples_of(page).values() for example in shown for token in example["chosen"]["tokens"]
    }
    assert len(tokens) > 20
    assert not any(" " in token or "\t" in token for token in tokens)
    assert any(token.startswith("\N{MIDDLE DOT}") for token in tokens)
    assert any("\N{RETURN SYMBOL}\n" in token for token in tokens)
    special = {
        text.tokens[number]
        for example in dashboards.examples
        for text in (example.chosen, example.rejected)
        for number in text.special
    }
    assert special == {"<eos>"}


@pytest.mark.parametrize(
    ("token", "shown"),
    [(" a", "·a"), ("\n", "⏎\n"), ("\t", "⇥"), ("·", "\\u00b7"), ("\r", "\\u000d"), ("\u202e", "\\u202e"),
     ("\U000e0041", "\\U000e0041"), ("", "▫"), ("é日", "é日"), ("\u00a0", "\\u00a0")],
)  # fmt: skip
def test_tokens_as_shown(token, shown):
    assert shown_token(token) == shown


def test_numbers_have_significant_digits():
    assert [number(value) for value in (0.000012345, -1.5, 0.0)] == ["+1.23e-05", "-1.5", "0"]
    assert number_with_interval(0.123456, 0.1, 0.15) == "+0.123 [+0.100, +0.150]"
    assert number_with_interval(12.3456, 2.3, 22.1) == "+12.3 [+2.3, +22.1]"
    assert number_with_interval(1e-9, 0.5e-9, 1.5e-9) == "+1e-09 [+5e-10, +1.5e-09]"
    assert number_with_interval(0.5, float("nan"), float("nan")) == "+0.5"
    assert number_with_interval(0.5, 0.5, 0.5) == "+0.5 [+0.5, +0.5]"


@pytest.mark.parametrize("peak", [0, 1, 30, 119, 159])
def test_a_long_text_is_folded_around_its_peak(peak):
    activations = tuple(float(number == peak) for number in range(160))
    shown = page_text(ActiveText(("x",) * 160, activations, (), 20, peak, 3, 400))
    start, end = shown["window"]
    assert start <= peak < end
    assert end - start <= 41
    assert start == max(0, peak - 24)
    assert torch.tensor(activations[start:end]).max() == 1
