"""Training of families: a base model and the reward models trained from it, which a study compares."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rmtension.data._pairs import PreferencePairs
from rmtension.errors import OptionError
from rmtension.store._provenance import digest_of_folder
from rmtension.study._family_runs import MODELS, OBJECTIVES, ModelFamily
from rmtension.training._select_pairs import select_pairs
from rmtension.training._train_base_model import train_base_model
from rmtension.training._train_reward_model import train_reward_model
from rmtension.training._train_tokenizer import train_tokenizer
from rmtension.training._trainer_run import digest_of_texts, is_finished, require_free, require_package


@dataclass(frozen=True)
class FamilySettings:
    """Model sizes and training schedule of `train_family`.

    The defaults suit `preference_world` and take about a minute on two CPU cores. The models have the GPT-2
    architecture, with 4 * `d_model` MLP neurons per layer. `max_length` is in tokens; a longer response raises
    `DataError` unless `truncate_response` is True. `mixed_pairs` is the number of pairs of the mixed model (None: as
    many as equal parts allow). Raises `OptionError` for sizes that are not positive or do not fit together.

    Examples:
        >>> FamilySettings(n_layer=2, reward_epochs=1.0).d_model
        96
    """

    n_layer: int = 3
    d_model: int = 96
    n_head: int = 4
    vocab_size: int = 1024
    max_length: int = 128
    truncate_response: bool = False
    base_epochs: float = 1.0
    base_learning_rate: float = 2e-3
    base_batch_size: int = 16
    reward_epochs: float = 2.0
    reward_learning_rate: float = 7e-4
    reward_warmup_steps: int = 20
    reward_batch_size: int = 16
    mixed_pairs: int | None = None

    def __post_init__(self) -> None:
        if min(self.n_layer, self.d_model, self.n_head) < 1 or self.d_model % self.n_head:
            raise OptionError(
                f"d_model, n_head: expected positive sizes, n_head a divisor of d_model, got n_layer={self.n_layer}, "
                f"d_model={self.d_model}, n_head={self.n_head}."
            )


def train_family(
    pairs: Mapping[str, PreferencePairs],
    output_dir: str | Path,
    *,
    base: str | Path | None = None,
    settings: FamilySettings | None = None,
    seed: int = 0,
    progress: bool | None = None,
    overwrite: bool = False,
    resume: bool = False,
    on_stage: Callable[[str], object] | None = None,
) -> dict[str, Path]:
    """Train a base model, one reward model per objective, and one on all objectives in equal parts.

    `pairs` maps objectives to training pairs. Returns the folders below `output_dir` by name: "base", every objective
    and "mixed". Without `base`, a tokenizer and a language model with the GPT-2 architecture are trained on the chosen
    texts of all objectives, so that the base has seen which prompts are refused, as an instruction-tuned model has.
    With `base`, `settings` apply to the reward models only. With `resume`, finished models of a run with the same
    pairs, base, seed and schedule are kept, and only the missing ones are trained; a model of a different run raises
    `StorageError`. `on_stage` is called with the name of every model before it is trained. Raises `OptionError` for
    fewer than two objectives; other errors are those of `train_reward_model`.

    Examples:
        >>> settings = FamilySettings(reward_epochs=1.0, reward_batch_size=24, max_length=64)  # a step per model
        >>> folders = train_family(pairs, "family", base="organism", settings=settings, progress=False)
        >>> sorted(folders), RewardHead.from_pretrained(folders["mixed"]).n_layers
        (['base', 'harmless', 'helpful', 'mixed'], 2)
    """
    chosen = settings or FamilySettings()
    tell = on_stage or (lambda name: None)
    if len(pairs) < 2 or {"base", "mixed"} & set(pairs):
        raise OptionError(
            f"pairs: expected two objectives or more, none called 'base' or 'mixed', got {sorted(pairs)}. For a single "
            "objective, use train_reward_model."
        )
    root = Path(output_dir)
    folders = {name: root / name for name in (*(["base"] if base is None else []), *pairs, "mixed")}
    texts = sorted({pair.text("chosen") for part in pairs.values() for pair in part}) if base is None else []
    shares = {name: 1 / len(pairs) for name in pairs}
    mixtures: dict[str, dict[str, Any]] = {name: {"objective": name} for name in pairs}
    mixtures["mixed"] = {"proportions": shares, "n_pairs": chosen.mixed_pairs}
    start = Path(base) if base is not None else folders["base"]
    finished: set[str] = set()
    if resume and not overwrite:
        if base is None and is_finished(
            folders["base"],
            {"seed": seed, "epochs": chosen.base_epochs, "learning_rate": chosen.base_learning_rate},
            data=digest_of_texts(texts),
        ):
            finished.add("base")
        for name in mixtures:
            if is_finished(
                folders[name],
                {"seed": seed, "epochs": chosen.reward_epochs, "learning_rate": chosen.reward_learning_rate},
                data=select_pairs(pairs, **mixtures[name], seed=seed).digest,
                **({"base_digest": digest_of_folder(start)} if start.is_dir() else {}),
            ):
                finished.add(name)
    if finished != set(folders):
        # Checked before the base is trained, which needs no TRL and may take long.
        require_package("trl")
    for name, folder in folders.items():
        if name not in finished:
            require_free(folder, overwrite)
    if base is None and "base" not in finished:
        # With rejected texts too, the base could not learn which responses go with which prompts. The reward models
        # would have to learn it: on preference_world, harmlessness then takes twice as long.
        tell("base")
        _train_family_base(texts, folders["base"], chosen, seed, progress, overwrite)
    for name, mixture in mixtures.items():
        if name in finished:
            continue
        tell(name)
        train_reward_model(
            pairs,
            start,
            folders[name],
            **mixture,
            seed=seed,
            epochs=chosen.reward_epochs,
            learning_rate=chosen.reward_learning_rate,
            warmup_steps=chosen.reward_warmup_steps,
            batch_size=chosen.reward_batch_size,
            max_length=chosen.max_length,
            truncate_response=chosen.truncate_response,
            progress=progress,
            overwrite=overwrite,
        )
    return {"base": start, **folders}


def train_seeds(
    pairs: Mapping[str, PreferencePairs],
    output_dir: str | Path,
    seeds: Sequence[int],
    *,
    base: str | Path | None = None,
    settings: FamilySettings | None = None,
    name: str = "models",
    progress: bool | None = None,
    overwrite: bool = False,
    resume: bool = True,
    on_stage: Callable[[str], object] | None = None,
) -> list[ModelFamily]:
    """Train a helpful, a harmless and a mixed reward model per seed, all from one base, ready for `TensionStudy`.

    `pairs` maps "helpful" and "harmless" to training pairs. Without `base`, the first seed trains the base of all
    seeds. Finished models of an earlier run are kept unless `resume` is False or `overwrite` is True. The folders are
    `output_dir/seed-0/helpful` and so on. `on_stage` is called with a line before every training, such as "training
    reward model 2 of 3: harmless". Raises `OptionError` for other objectives; other errors are those of `train_family`.

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
    families: list[ModelFamily] = []
    for number, seed in enumerate(seeds):
        named = None if on_stage is None else partial(_stage, on_stage, number=number, seed=seed, n_seeds=len(seeds))
        folders = train_family(
            pairs,
            Path(output_dir) / f"seed-{seed}",
            base=base,
            settings=settings,
            seed=seed,
            progress=progress,
            overwrite=overwrite,
            resume=resume,
            on_stage=named,
        )
        base = folders["base"]
        families.append(ModelFamily(**folders, name=name, seed=seed))
    return families


def _stage(tell: Callable[[str], object], model: str, *, number: int, seed: int, n_seeds: int) -> None:
    """Tell which model of which seed is trained next."""
    which = "the base model"
    if model != "base":
        which = f"reward model {number * len(MODELS) + MODELS.index(model) + 1} of {n_seeds * len(MODELS)}: {model}"
    tell(f"training {which}{f', seed {seed}' if n_seeds > 1 else ''}")


def _train_family_base(
    texts: Sequence[str], folder: Path, settings: FamilySettings, seed: int, progress: bool | None, overwrite: bool
) -> None:
    from transformers import GPT2Config

    tokenizer = train_tokenizer(texts, settings.vocab_size, max_length=settings.max_length)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=settings.max_length,
        n_embd=settings.d_model,
        n_layer=settings.n_layer,
        n_head=settings.n_head,
        # The same function as "gelu_new" of GPT-2, in one kernel instead of eight.
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    train_base_model(
        texts,
        config,
        tokenizer,
        folder,
        seed=seed,
        epochs=settings.base_epochs,
        learning_rate=settings.base_learning_rate,
        batch_size=settings.base_batch_size,
        max_length=settings.max_length,
        progress=progress,
        overwrite=overwrite,
    )
