"""The recipe of a replication: base, pairs, sizes, schedule and options, read from a small YAML file."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from rmtension.errors import OptionError
from rmtension.study._config import checked_mapping, load_yaml, read_options
from rmtension.study._family_runs import OBJECTIVES
from rmtension.study._options import StudyOptions
from rmtension.training._family_trainings import FamilySettings

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Recipe:
    """What `replicate` does: every choice that its results depend on.

    - `base`: a folder, a hub name, or a GGUF file of a language model.
    - `pairs`: "helpful" and "harmless" -> files, or hub names, of preference pairs.
    - `seeds`: one family of three reward models each.
    - `max_length`: tokens per text; pairs with a longer text are left out and counted.
    - `test_share` and `validation_share`: shares of the prompts that no model is trained on. Validation pairs stop a
      training and select its checkpoint; every result is measured on test pairs. `split_seed` determines the split.
    - `training`: the schedule of the reward models.
    - `study`: the options of the study by the corrected rules; `n_scoring` and `n_evaluating`: the largest numbers of
      test pairs per objective that score neurons, and that evaluate ablations. Accuracies use all test pairs.
    - `paper`: the options of a second study, by the published rules; None leaves it out.
    - `n_single`: how many neurons are ablated one by one to test the methods, on `n_faithful` pairs per objective;
      `n_sets`: how many sets. `n_neurons`: how many neurons get a page.
    - `jobs`: how many reward models are trained at a time.

    Raises `OptionError` for a value that makes no sense.

    Examples:
        >>> recipe = Recipe("base", {"helpful": ("a.jsonl",), "harmless": ("b.jsonl",)})
        >>> recipe.seeds, recipe.max_length
        ((0, 247, 932), 320)
    """

    base: str
    pairs: Mapping[str, tuple[str, ...]]
    seeds: tuple[int, ...] = (0, 247, 932)
    max_length: int = 320
    test_share: float = 0.2
    validation_share: float = 0.04
    split_seed: int = 0
    training: FamilySettings = field(default_factory=FamilySettings)
    study: StudyOptions = field(default_factory=StudyOptions)
    paper: StudyOptions | None = field(default_factory=lambda: StudyOptions.of("paper"))
    n_scoring: int = 200
    n_evaluating: int = 200
    n_single: int = 420
    n_faithful: int = 16
    n_sets: int = 50
    n_neurons: int = 30
    jobs: int = 1

    def __post_init__(self) -> None:
        if set(self.pairs) != set(OBJECTIVES) or not all(self.pairs.values()):
            raise OptionError(f"pairs: expected files of {list(OBJECTIVES)}, got {dict(self.pairs)}.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise OptionError(f"seeds: expected one or several different numbers, got {list(self.seeds)}.")
        for name in ("test_share", "validation_share"):
            if not 0 < getattr(self, name) < 1:
                raise OptionError(f"{name}: expected a number between 0 and 1, got {getattr(self, name)}.")
        for name in ("max_length", "n_scoring", "n_evaluating", "n_faithful", "jobs"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}: expected at least 1, got {getattr(self, name)}.")
        for name in ("n_single", "n_sets", "n_neurons"):
            if getattr(self, name) < 0:
                raise OptionError(f"{name}: expected 0 (to leave it out) or more, got {getattr(self, name)}.")


def read_recipe(path: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    r"""Read a recipe from a YAML file; relative paths of files are relative to it.

    The keys are the fields of `Recipe`. `training` is a mapping of arguments of `train_reward_model` (`epochs`,
    `learning_rate`, `batch_size`, `trained_layers`, `balance_length`, `eval_steps`, `select_by`, `patience`,
    `warmup_steps`, `dtype`); `study` and `paper` are mappings of fields of `StudyOptions`; `paper: false` leaves that
    study out.
    `changes` replaces keys of the file. Raises `DataError` for an unreadable file and `OptionError` for a wrong key or
    value.

    Examples:
        >>> text = "base: ./base\npairs: {helpful: a.jsonl, harmless: [b.jsonl, c.jsonl]}\ntraining: {epochs: 1}"
        >>> _ = Path("recipe.yaml").write_text(text)
        >>> read_recipe("recipe.yaml").training.reward_epochs
        1.0
    """
    path = Path(path)
    written = load_yaml(path)
    if not isinstance(written, Mapping):
        raise OptionError(f"{path}: expected a mapping with the fields of a recipe, got {type(written).__name__}.")
    values = {**written, **(changes or {})}
    return make_recipe(values, folder=path.parent, where=str(path))


def make_recipe(values: Mapping[str, Any], *, folder: Path, where: str) -> Recipe:
    """The recipe that a mapping describes; `where` names it in errors, and paths are relative to `folder`."""
    known = [each.name for each in fields(Recipe)]
    given = dict(checked_mapping(values, where, known, required=("base", "pairs")))
    given["base"] = _place(str(given["base"]), folder)
    given["pairs"] = {
        name: tuple(_place(str(file), folder) for file in (listed if isinstance(listed, list | tuple) else [listed]))
        for name, listed in checked_mapping(given["pairs"], f"{where}: pairs", OBJECTIVES).items()
    }
    if "seeds" in given:
        if not isinstance(given["seeds"], list | tuple) or not all(type(seed) is int for seed in given["seeds"]):
            raise OptionError(f"{where}: seeds: expected a list of whole numbers, got {given['seeds']!r:.80}.")
        given["seeds"] = tuple(given["seeds"])
    for name in (each.name for each in fields(Recipe) if each.name in given and type(each.default) in (int, float)):
        kinds = (int, float) if type(getattr(Recipe, name)) is float else (int,)
        if type(given[name]) not in kinds:
            kind = "number" if float in kinds else "whole number"
            raise OptionError(f"{where}: {name}: expected a {kind}, got {given[name]!r:.80}.")
    length = given.get("max_length", Recipe.max_length)
    given["training"] = _training(given.get("training") or {}, length, f"{where}: training")
    given["study"] = read_options({"options": given.get("study")}, f"{where}: study")
    without_paper = given.get("paper") is False
    rules = {"rules": "paper", "options": given.get("paper")}
    given["paper"] = None if without_paper else read_options(rules, f"{where}: paper")
    return Recipe(**given)


def _place(name: str, folder: Path) -> str:
    """A path relative to `folder` if that exists, else the name as it is: a hub name, or a path that does not exist."""
    path = folder / Path(name).expanduser()
    return str(path) if path.exists() else name


def _training(given: Any, max_length: int, where: str) -> FamilySettings:
    prefix = "reward_"
    known = [each.name.removeprefix(prefix) for each in fields(FamilySettings) if each.name.startswith(prefix)]
    settings: dict[str, Any] = {}
    for name, value in checked_mapping(given, where, known).items():
        if name == "dtype":
            if value not in _DTYPES:
                raise OptionError(f"{where}.dtype: expected one of {list(_DTYPES)}, got {value!r}.")
            value = _DTYPES[value]
        elif name in ("epochs", "learning_rate"):
            value = float(value)  # YAML reads 1e-4 as text
        settings[prefix + name] = value
    return FamilySettings(max_length=max_length, **settings)
