"""Pages that show what they print: their blocks run in order, and print what stands below them."""

import argparse
import contextlib
import gzip
import io
import json
import re
from decimal import Decimal
from pathlib import Path

import pytest
from built_site import WORDS, fetched, sections_with
from documented import DECIMAL, ROOT, blocks, cells, commands, counted, limited, pages, run, same
from tiny_models import grid

import rmtension

DOCS = ROOT / "docs"
SECONDS = 120  # for a page, on a machine that does other things too; the longest takes 35


def small_chat_model():
    """For the families page: a model with a chat template, and the names that the page takes for granted."""
    import torch
    from tiny_models import make_pairs, make_tokenizer, save_classifier

    tokenizer = make_tokenizer("tokenizer")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    head = rmtension.RewardHead.from_pretrained(save_classifier("model", "gpt2", tokenizer))
    pairs = make_pairs(4)
    tokens = tokenizer(["bake a cake", "help"], return_tensors="pt", padding=True)
    mask = torch.zeros(3, 64, dtype=torch.bool)
    mask[0, :5] = True
    return {
        "head": head,
        "PreferencePairs": rmtension.PreferencePairs,
        "rows": [pair.to_dict() for pair in pairs],
        "input_ids": tokens["input_ids"],
        "attention_mask": tokens["attention_mask"],
        "neurons": rmtension.NeuronSet(mask, "mlp", head.architecture),
        "means": rmtension.ActivationCollector(head, site="mlp").collect(pairs.as_chat()),
    }


def two_models_of_the_hub():
    """For the page that compares two: under the names of the hub, folders of small models and of few pairs."""
    from rmtension.synthetic._organisms import make_organism

    organism = make_organism("organism", noise=0.03, n_pairs=60)
    head = organism.head()
    for name, other in (("helpful", "harmless"), ("harmless", "helpful")):
        head.with_ablation(organism.truth[other]).save_pretrained(f"Ray2333/gpt2-large-{name}-reward_model")
        rows = [{side: pair.text(side) for side in ("chosen", "rejected")} for pair in organism.pairs[name]]
        folder = Path("Anthropic", "hh-rlhf", f"{name}-base")
        folder.mkdir(parents=True)
        (folder / "test.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    return {}


def replicas_of_the_hub():
    """For the page of kinds: under the names of the hub, folders of replicas."""
    import torch
    from all_replicas import ALL
    from replicas import make_pairs
    from rewritten_files import with_tensors

    kinds = {replica.kind: replica for replica in ALL}
    armo = kinds["objectives, gated by the prompt"]
    armo.make(Path("RLHFlow", "ArmoRM-Llama3-8B-v0.1"))
    kinds["attributes with fixed weights"].make(Path("LxzGordon", "URM-LLaMa-3-8B"))
    own = {"my_head.first.weight": torch.ones(8, 32), "my_head.second.weight": torch.ones(2, 8)}
    with_tensors(Path("RLHFlow", "ArmoRM-Llama3-8B-v0.1"), Path("folder"), own)
    return {"pairs": make_pairs(armo)}


# The files in a page's folder, and the names that its blocks use.
BEFORE = {
    "docs/families.md": small_chat_model,
    "docs/compare_two.md": two_models_of_the_hub,
    "docs/kinds.md": replicas_of_the_hub,
}
# Pages that another test runs, because what they need is made there.
ELSEWHERE = {"docs/paper.md": "tests/study/test_study.py"}
WITH_BLOCKS = {
    name: page for page in pages() if blocks(page.read_text()) and (name := page.relative_to(ROOT).as_posix())
}
HERE = [name for name in WITH_BLOCKS if name not in ELSEWHERE]
# Pages whose blocks train, repair, study, start processes or take every effect of a model; the home page has the
# README's blocks.
LONG = [
    f"docs/{name}.md"
    for name in (
        "ablate_and_export",
        "attribution",
        "command_line",
        "compare_two",
        "during_training",
        "index",
        "inspect",
        "large_models",
        "one_model",
        "outputs",
        "repair",
        "report",
        "sets",
        "sums_over_tokens",
    )
]


# TRL calls transformers by names that it has deprecated.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", grid(HERE, keep=[name for name in HERE if name not in LONG]))
def test_blocks_print_what_the_page_says(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with limited(SECONDS, name):
        names = BEFORE.get(name, dict)()
        wrong = run(WITH_BLOCKS[name].read_text(), name, names)
    assert wrong == []
    # A figure that a page says it writes is one.
    for figure in re.findall(r'savefig\("(\w+\.(?:png|svg))"', WITH_BLOCKS[name].read_text()):
        assert (tmp_path / figure).stat().st_size > 10_000


def test_pages_that_run_elsewhere_have_their_test():
    for name, test in ELSEWHERE.items():
        assert f'compile(block, "{name}", "exec")' in (ROOT / test).read_text()


def test_skipped_blocks_are_listed():
    """`python tests/programs/documented.py` prints this. A block is left out with a reason, and counted here."""
    numbers, left = counted()
    print(numbers)
    assert [(page, reason) for page, _, reason in left] == NOT_RUN
    assert numbers["blocks"] >= 55
    assert numbers["docstring examples"] >= 150
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for notebook, number in cells():
        assert number
        assert notebook.name in tests, "every notebook is run by some test"


NOT_RUN = [
    ("docs/large_models.md", "needs four GPUs"),
    ("docs/large_models.md", "needs two GPUs"),
]


class Parsed(Exception):  # noqa: N818 - no error
    """Ends a command whose options were understood."""


def understood(words, monkeypatch):
    """Whether `rmtension` takes these words; nothing runs."""
    from rmtension.cli._command_line import main

    parse = argparse.ArgumentParser.parse_args

    def stop(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Parsed

    with monkeypatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        try:
            main(words)
        except Parsed:
            return True
        except SystemExit as end:
            return end.code == 0
    return False


def program_text(path):
    """The text of a program and of the programs beside it that it imports, which may name its options."""
    text = path.read_text()
    beside = [path.with_name(f"{name}.py") for name in re.findall(r"^from (\w+) import", text, re.MULTILINE)]
    return "\n".join([text, *(other.read_text() for other in beside if other.is_file())])


def mistake(words, monkeypatch):
    """What is wrong with a command of a page, as far as that can be told without running it; "" where nothing is."""
    program, *rest = words
    if program == "rmtension":
        return "" if understood(rest, monkeypatch) else "rmtension does not take these options"
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return "" if set(rest) <= set(targets) else "no such target"
    for index, word in enumerate(words):
        # A program of this repository has the options that the page passes.
        if re.fullmatch(r"(examples|tests)/\S+\.py", word):
            if not (ROOT / word).is_file():
                return f"no file {word}"
            options = {option.partition("=")[0] for option in words[index + 1 :] if option.startswith("--")}
            text = program_text(ROOT / word)
            if program != "pytest" and (missing := {option for option in options if f'"{option}"' not in text}):
                return f"{word} has no {sorted(missing)}"
    return ""


def test_commands_of_pages_are_accepted(monkeypatch):
    listed = [(page, line, words) for page in pages() for line, words in commands(page.read_text())]
    assert len(listed) >= 13
    wrong = [(page.name, line, message) for page, line, words in listed if (message := mistake(words, monkeypatch))]
    assert wrong == []


@pytest.mark.parametrize(
    "command",
    [
        "rmtension demo --sseeds 3",
        "rmtension dmo",
        "make demo tset",
        "python examples/real_pears.py",
        "torchrun --nproc-per-node 2 examples/many_processes.py --modell x",
    ],
)
def test_a_wrong_command_is_seen(command, monkeypatch):
    ((line, words),) = commands(f"# Page\n\n```sh\n{command} \\\n  # more\n```\n")
    assert line == 4
    assert mistake(words, monkeypatch)


def test_a_block_that_takes_too_long_is_ended():
    with pytest.raises(TimeoutError, match=r"page takes longer than 0\.05 s"), limited(0.05, "page"):
        run("```python\nwhile True:\n    pass\n```\n", "page")


PAGE = """# A page

```python
n = 3
```

Then

```python
print("mean", f"{n / 8:.2f} [-0.10, 0.80], n = {n}")
print("second line")
```

```text
mean 0.38 [-0.10, 0.80], n = 3
second line
```

```sh
some command
```

```text
what it says, which nobody compares
```

<!-- not run: needs four GPUs -->
```python
n = 4
raise SystemExit
```

```python
print(f"{1 / n:.3f}")
```

```text
0.333
```
"""


def test_a_correct_page_passes():
    assert [block.line for block in blocks(PAGE)] == [3, 9, 28, 33]
    assert [block.not_run for block in blocks(PAGE)] == [None, None, "needs four GPUs", None]
    assert run(PAGE, "page") == []
    # One in the last place, and spaces behind a line, as tables of pandas have.
    assert run(PAGE.replace("0.38", "0.37").replace("second line\n`", "second line  \n`"), "page") == []


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("mean 0.38", "mean 0.36", 9),
        ("mean 0.38", "mean 0.4", 9),
        ("mean 0.38", "mean -0.38", 9),
        ("0.80], n = 3\n", "0.80], n = 4\n", 9),
        ("mean 0.38", "median 0.38", 9),
        ("mean 0.38", "mean  0.38", 9),
        ("\nsecond line\n", "\n", 9),
        ("second line\n`", "second line\n3\n`", 9),
        ("0.333", "0.335", 33),
        ("n = 3\n```", "n = 3\nprint(n)\n```", 3),
        ("```text\n0.333\n```", "", 33),
    ],
)
def test_a_wrong_page_fails_at_its_line(old, new, line):
    assert PAGE.count(old) == 1
    assert [line_of_block for line_of_block, _, _ in run(PAGE.replace(old, new), "page")][-1:] == [line]


def test_a_changed_number_of_the_attribution_page_is_seen():
    """Every decimal that the page says is printed, moved by two in its last place."""
    stated = [block.stated for block in blocks((DOCS / "attribution.md").read_text())]
    moved = 0
    for text in stated:
        for number in DECIMAL.finditer(text):
            more = Decimal(number[1]) + Decimal(2).scaleb(Decimal(number[1]).as_tuple().exponent)
            assert not same(text, f"{text[: number.start()]}{more}{text[number.end() :]}")
            moved += 1
    assert moved > 100


@pytest.mark.parametrize(
    "page", ["```text\n1\n```\n", "```python\n1\n```\nand\n```text\n```\n", "```bash\nls\n```\n", "```text\n```\n" * 2]
)
def test_a_page_whose_blocks_stand_elsewhere_is_refused(page):
    with pytest.raises(AssertionError):
        blocks(page)


def test_a_block_that_raises_names_the_line_of_the_page():
    with pytest.raises(ZeroDivisionError) as caught:
        run(PAGE.replace("n = 3\n```", "n = 3\n1 / 0\n```"), "page")
    assert (str(caught.traceback[-1].path), caught.traceback[-1].lineno) == ("page", 4)


@pytest.mark.parametrize(
    ("text", "style", "n"),
    [
        ('<script src="https://a.test/x.js"></script><link rel="stylesheet" href="//a.test/x.css">', False, 2),
        ('<img src="https://a.test/x.png"><img src="x.png">', False, 1),
        (
            '<a href="https://a.test">read</a><link rel="canonical" href="https://a.test"><script src="x.js"></script>',
            False,
            0,
        ),
        ('@import "https://a.test/x.css"; a { background: url(//a.test/x.png) }', True, 2),
        ("a { background: url(x.png) url('data:image/svg+xml;,') }", True, 0),
    ],
)
def test_what_a_built_page_loads_from_elsewhere_is_seen(text, style, n):
    assert len(fetched(text, style=style)) == n


def test_the_search_finds_beginnings_of_words_in_titles_and_texts():
    entries = [("a", "Load a CSV", "rows"), ("b", "x", "one category, cached_property"), ("c", "x", "precaching")]
    index = {"docs": [{"location": place, "title": title, "text": text} for place, title, text in entries]}
    found = {word: sections_with(word, index) for word in ("csv", "categor", "caching", "property", "rows")}
    assert found == {"csv": ["a"], "categor": ["b"], "caching": [], "property": ["b"], "rows": ["a"]}
    # What `make docs` then looks for in the built site.
    assert len(WORDS) >= 10


def test_the_home_page_shows_the_blocks_of_the_readme():
    readme, home = (blocks(path.read_text()) for path in (ROOT / "README.md", DOCS / "index.md"))
    assert [(block.code, block.stated) for block in home] == [(block.code, block.stated) for block in readme]
    assert len(home) >= 4


def test_the_site_is_built_so_that_warnings_count():
    """With --quiet mkdocs drops warnings before --strict counts them."""
    (line,) = re.findall(r"^\t.*mkdocs build.*$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert "--strict" in line
    assert "--quiet" not in line
