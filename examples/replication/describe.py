"""Describe the neurons of a finished replication by reading texts, and score the descriptions on other texts.

    python describe.py smollm2.yaml --out replication                              # writes to_describe.txt
    python describe.py smollm2.yaml --out replication --descriptions neurons.yaml  # scores them, and makes their page

`to_describe.txt` has, for every neuron, the texts on which it is most active, with the active tokens between << and >>.
Read them, and write neurons.yaml: for each neuron what it fires on, in words, and a regular expression that finds this
in a text:

    L12 N345: {fires on: "refusals that begin with an apology", finds: "I'm sorry|I can't"}

For every held-out text the answer is whether the expression finds anything. The AUROC says how well this tells the
texts on which the neuron is active from the others; it is .5 for a description that says nothing. Texts may be
offensive: that is what harmlessness data is made of.
"""

import argparse
import re
from pathlib import Path

import yaml

from rmtension.replication import read_recipe, replicate


class Reader:
    """Answers both questions about a neuron from what a person wrote, and keeps the texts that it was shown."""

    def __init__(self, written: dict[str, dict[str, str]]) -> None:
        self.written, self.shown = written, []

    def __call__(self, question: str) -> str:
        """The answer to a question."""
        shown = re.match(r"These texts are those on which neuron (.+?) of", question)
        if shown:
            self.shown.append(question)
            return f"{shown[1]}: {self.written.get(shown[1], {}).get('fires on', 'not described')}"
        name = question.split("description:\n")[1].split(":")[0]
        text = question.split("--- the text begins\n")[1].split("\n--- the text ends")[0]
        if name not in self.written:
            return "5"
        return "yes" if re.search(self.written[name]["finds"], text) else "no"


def main() -> None:
    """Describe the neurons of --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, default=Path("replication"))
    parser.add_argument("--descriptions", type=Path)
    options = parser.parse_args()
    written = yaml.safe_load(options.descriptions.read_text()) if options.descriptions else {}
    reader = Reader(written)
    replicate(read_recipe(options.recipe), options.out, describe=reader, on_stage=print)
    (options.out / "to_describe.txt").write_text("\n\n=======\n\n".join(reader.shown))
    print(
        f"{len(reader.shown)} neurons: {options.out / 'to_describe.txt'}, {options.out / 'corrected' / 'report.html'}"
    )


if __name__ == "__main__":
    main()
