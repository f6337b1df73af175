"""The base model and the pairs of a replication, prepared for training: converted, cleaned, labelled and split."""

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from rmtension.data._encoding import encode_pairs
from rmtension.data._pairs import PreferencePairs
from rmtension.data._refusals import SHOULD_REFUSE, SHOULD_RESPOND, label_refusals
from rmtension.errors import DataError, ModelError
from rmtension.evaluation._length import length_baseline
from rmtension.models._portable import make_portable
from rmtension.replication._recipe import Recipe
from rmtension.store._files import filled_whole
from rmtension.study._family_runs import OBJECTIVES, joined

SPLITS = ("train", "validation", "scoring", "evaluation")


@dataclass(frozen=True)
class PreparedPairs:
    """Pairs by split and objective, and a table of what was read, left out and kept.

    No two splits share a prompt. `test` is `scoring` and `evaluation` together.
    """

    parts: Mapping[str, Mapping[str, PreferencePairs]]
    counts: pd.DataFrame

    @property
    def test(self) -> dict[str, PreferencePairs]:
        """All test pairs by objective."""
        return {name: self.parts["scoring"][name] + self.parts["evaluation"][name] for name in OBJECTIVES}


def prepare_base(name: str, folder: Path) -> Path:
    """The folder of the base model: a local checkpoint as it is; a GGUF file or a hub model is written to `folder`.

    A model read from GGUF is moved into a model of a fresh config, because transformers does not save it otherwise.
    Raises `ModelError` if the model cannot be loaded.
    """
    if Path(name).is_dir():
        return Path(name)
    if (folder / "config.json").is_file():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(name)
    is_gguf = path.suffix == ".gguf"
    if path.suffix and path.exists() and not is_gguf:
        raise ModelError(f"base: expected a folder, a hub name or a GGUF file, got {name}.")
    where: dict[str, Any] = {"gguf_file": path.name} if is_gguf else {}
    source = str(path.parent) if is_gguf else name
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="float32", **where)
        tokenizer: Any = AutoTokenizer.from_pretrained(source, **where)
    except (OSError, ValueError, ImportError, KeyError) as error:
        advice = " Reading GGUF files needs `pip install gguf`." if is_gguf else " Check the name."
        raise ModelError(f"base: transformers could not load {name}: {error}.{advice}") from error
    if is_gguf:
        values = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_OF_CONFIG}
        fresh: Any = AutoModelForCausalLM.from_config(type(model.config)(**values), dtype=model.dtype)
        fresh.load_state_dict(model.state_dict())
        model = fresh
    with filled_whole(folder, "base model", seal="config.json") as written:
        model.save_pretrained(written)
        tokenizer.save_pretrained(written)
        make_portable(written, tokenizer)
    return folder


# What a config that was read from GGUF has and a fresh one must not have.
_NOT_OF_CONFIG = (
    "quantization_config",
    "_name_or_path",
    "model_type",
    "dtype",
    "architectures",
    "transformers_version",
)


def prepare_pairs(recipe: Recipe, tokenizer: Any) -> PreparedPairs:
    """Read the pairs, clean them, label refusals, leave out long ones, and split by prompt.

    Left out are rows without two different responses, repetitions, and pairs of which a whole text has more than
    `max_length` tokens, so that nothing is cut. A prompt that both objectives have is in the same split for both.
    """
    rows: list[dict[str, Any]] = []
    kept: dict[str, PreferencePairs] = {}
    for name in OBJECTIVES:
        read = sum((_read(source, name) for source in recipe.pairs[name]), start=PreferencePairs([]))
        n_skipped = sum(read.skipped.values())
        distinct = PreferencePairs({pair.digest(): pair for pair in read if not pair.is_tie}.values())
        fitting = _fitting(distinct, tokenizer, recipe.max_length)
        rows += [
            {"objective": name, "what": what, "pairs": n}
            for what, n in (
                ("read", len(read) + n_skipped),
                ("invalid, left out", n_skipped),
                ("equal responses or repeated, left out", len(read) - len(distinct)),
                ("too long, left out", len(distinct) - len(fitting)),
            )
        ]
        kept[name] = label_refusals(fitting)
    splits = _split(kept, recipe)
    for name in OBJECTIVES:
        for split in SPLITS:
            part = splits[split][name]
            if not len(part):
                raise DataError(f"pairs: no {name} pairs are left for {split}. Give more pairs, or raise max_length.")
            encoded = encode_pairs(tokenizer, part, max_length=sys.maxsize)
            labels = Counter(pair.subset for pair in part)
            rows.append(
                {
                    "objective": name,
                    "what": split,
                    "pairs": len(part),
                    "prompts": len(part.prompts),
                    "tokens": encoded.n_tokens,
                    "longer is chosen": length_baseline(part).value,
                    SHOULD_REFUSE: labels[SHOULD_REFUSE],
                    SHOULD_RESPOND: labels[SHOULD_RESPOND],
                    "digest": part.digest,
                }
            )
    return PreparedPairs(splits, pd.DataFrame(rows))


def _read(source: str, objective: str) -> PreferencePairs:
    path = Path(source)
    if path.is_file():
        return PreferencePairs.read(path, objective=objective, on_invalid="skip")
    if path.is_absolute() or source.startswith((".", "~")) or path.suffix or source.count("/") != 1:
        raise DataError(f"pairs: expected a file of pairs or a hub name, got {source}, which does not exist.")
    return PreferencePairs.from_hub(source, split="train", objective=objective, on_invalid="skip")


def _fitting(pairs: PreferencePairs, tokenizer: Any, max_length: int) -> PreferencePairs:
    encoded = encode_pairs(tokenizer, pairs, max_length=sys.maxsize)
    return PreferencePairs(
        pair
        for pair, both in zip(pairs, zip(encoded.chosen, encoded.rejected, strict=True), strict=True)
        if max(map(len, both)) <= max_length
    )


def _split(pairs: Mapping[str, PreferencePairs], recipe: Recipe) -> dict[str, dict[str, PreferencePairs]]:
    """Both objectives are split together, by prompt."""
    rest, test = joined(pairs).split(recipe.test_share, seed=recipe.split_seed)
    train, validation = rest.split(recipe.validation_share / (1 - recipe.test_share), seed=recipe.split_seed)
    scoring, evaluation = test.split(0.5, seed=recipe.split_seed)
    sides = dict(zip(SPLITS, (train, validation, scoring, evaluation), strict=True))
    return {split: {name: side.filter(objective=name) for name in OBJECTIVES} for split, side in sides.items()}
