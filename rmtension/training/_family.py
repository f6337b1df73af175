"""Training of families: a base model and the reward models trained from it, which a study compares."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rmtension.data._pairs import PreferencePairs
from rmtension.errors import OptionError
from rmtension.study._family_runs import MODELS, OBJECTIVES, ModelFamily
from rmtension.training._family_trainings import FamilySettings, train_families


def train_family(
    pairs: Mapping[str, PreferencePairs],
    output_dir: str | Path,
    *,
    base: str | Path | None = None,
    settings: FamilySettings | None = None,
    validation: Mapping[str, PreferencePairs] | None = None,
    seed: int = 0,
    jobs: int = 1,
    progress: bool | None = None,
    overwrite: bool = False,
    resume: bool = False,
    on_stage: Callable[[str], object] | None = None,
    on_log: Callable[[str, str], object] | None = None,
) -> dict[str, Path]:
    """Train a base model, one reward model per objective, and one on all objectives in equal parts.

    `pairs` maps objectives to training pairs, and `validation` to held-out pairs that select checkpoints. Returns the
    folders below `output_dir` by name: "base", every objective and "mixed". Without `base`, a tokenizer and a language
    model with the GPT-2 architecture are trained on the chosen texts of all objectives, so that the base has seen which
    prompts are refused, as an instruction-tuned model has. With `base`, `settings` apply to the reward models only.

    `jobs` reward models are trained at a time, each in a process of its own with its share of the threads; a script
    that passes `jobs` must call this below `if __name__ == "__main__":`. With `resume`, finished models of a run with
    the same pairs, base, seed and schedule are kept, and an interrupted training continues; a model of a different run
    raises `StorageError`. `on_stage` is called with the name of every model before it is trained, `on_log` with its
    name and seed and a line about its losses. Raises `OptionError` for fewer than two objectives; other errors are
    those of `train_reward_model`.

    Examples:
        >>> settings = FamilySettings(reward_epochs=1.0, reward_batch_size=24, max_length=64)  # a step per model
        >>> folders = train_family(pairs, "family", base="organism", settings=settings, progress=False)
        >>> sorted(folders), RewardHead.from_pretrained(folders["mixed"]).n_layers
        (['base', 'harmless', 'helpful', 'mixed'], 2)
    """
    return train_families(
        pairs,
        {seed: Path(output_dir)},
        base=base,
        settings=settings,
        validation=validation,
        jobs=jobs,
        progress=progress,
        overwrite=overwrite,
        resume=resume,
        on_stage=on_stage and (lambda name, _seed: on_stage(name)),
        on_log=on_log,
    )[seed]


def train_seeds(
    pairs: Mapping[str, PreferencePairs],
    output_dir: str | Path,
    seeds: Sequence[int],
    *,
    base: str | Path | None = None,
    settings: FamilySettings | None = None,
    validation: Mapping[str, PreferencePairs] | None = None,
    name: str = "models",
    jobs: int = 1,
    progress: bool | None = None,
    overwrite: bool = False,
    resume: bool = True,
    on_stage: Callable[[str], object] | None = None,
    on_log: Callable[[str, str], object] | None = None,
) -> list[ModelFamily]:
    """Train a helpful, a harmless and a mixed reward model per seed, all from one base, ready for `TensionStudy`.

    `pairs` maps "helpful" and "harmless" to training pairs, and `validation` to held-out pairs that select checkpoints.
    Without `base`, the first seed trains the base of all seeds. `jobs` reward models are trained at a time, each in a
    process of its own (see `train_family`). Finished models of an earlier run are kept, and an interrupted training
    continues, unless `resume` is False or `overwrite` is True. The folders are `output_dir/seed-0/helpful` and so on.
    `on_stage` is called with a line before every training, such as "training reward model 2 of 3: harmless". Raises
    `OptionError` for other objectives; other errors are those of `train_family`.

    Examples:
        >>> settings = FamilySettings(reward_epochs=1.0, reward_batch_size=24, max_length=64)  # a step per model
        >>> options = {"base": "organism", "settings": settings, "progress": False}
        >>> [family.seed for family in train_seeds(pairs, "seeds", [0], **options)]
        [0]
        >>> train_seeds(pairs, "seeds", [0], **options)[0].mixed.as_posix()  # keeps the finished models
        'seeds/seed-0/mixed'
    """
    if set(pairs) != set(OBJECTIVES):
        raise OptionError(f"pairs: expected exactly {list(OBJECTIVES)}, got {sorted(pairs)}.")

    def tell(model: str, seed: int) -> None:
        if on_stage is not None:
            which = "the base model"
            if model != "base":
                number = list(seeds).index(seed) * len(MODELS) + MODELS.index(model) + 1
                which = f"reward model {number} of {len(seeds) * len(MODELS)}: {model}"
            on_stage(f"training {which}{f', seed {seed}' if len(seeds) > 1 else ''}")

    folders = train_families(
        pairs,
        {seed: Path(output_dir) / f"seed-{seed}" for seed in seeds},
        base=base,
        settings=settings,
        validation=validation,
        jobs=jobs,
        progress=progress,
        overwrite=overwrite,
        resume=resume,
        on_stage=tell,
        on_log=on_log,
    )
    return [ModelFamily(**folders[seed], name=name, seed=seed) for seed in seeds]
