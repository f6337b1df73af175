"""What a family trains: a base model and one reward model per objective and seed, those that are missing."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from rmtension.data._pairs import PreferencePairs
from rmtension.errors import OptionError
from rmtension.store._provenance import digest_of_folder
from rmtension.training._select_pairs import select_pairs
from rmtension.training._side_by_side import run_side_by_side
from rmtension.training._train_base_model import train_base_model
from rmtension.training._train_tokenizer import train_tokenizer
from rmtension.training._trainer_run import (
    digest_of_config,
    digest_of_texts,
    is_finished,
    require_free,
    require_package,
)


@dataclass(frozen=True)
class FamilySettings:
    """Model sizes and training schedule of `train_family`.

    The defaults suit `preference_world` and take about a minute on two CPU cores. The models have the GPT-2
    architecture, with 4 * `d_model` MLP neurons per layer. `max_length` is in tokens; a longer response raises
    `DataError` unless `truncate_response` is True. `mixed_pairs` is the number of pairs of the mixed model (None: as
    many as equal parts allow). Fields that begin with `reward_` are arguments of `train_reward_model`. Raises
    `OptionError` for sizes that are not positive or do not fit together.

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
    reward_trained_layers: int | None = None
    reward_balance_length: bool = False
    reward_share_prompts: bool = False
    reward_eval_steps: int | None = None
    reward_patience: int | None = None
    reward_select_by: str = "loss"
    reward_dtype: torch.dtype = torch.float32
    mixed_pairs: int | None = None

    def __post_init__(self) -> None:
        if min(self.n_layer, self.d_model, self.n_head) < 1 or self.d_model % self.n_head:
            raise OptionError(
                f"d_model, n_head: expected positive sizes, n_head a divisor of d_model, got n_layer={self.n_layer}, "
                f"d_model={self.d_model}, n_head={self.n_head}."
            )


@dataclass(frozen=True)
class _Training:
    """A reward model to train: its name, and the arguments of `train_reward_model`."""

    name: str
    arguments: dict[str, Any]

    @property
    def seed(self) -> int:
        """Its seed."""
        return int(self.arguments["seed"])

    @property
    def folder(self) -> Path:
        """Where it will be."""
        return Path(self.arguments["output_dir"])


def train_families(
    pairs: Mapping[str, PreferencePairs],
    roots: Mapping[int, Path],
    *,
    base: str | Path | None,
    settings: FamilySettings | None,
    validation: Mapping[str, PreferencePairs] | None,
    jobs: int,
    progress: bool | None,
    overwrite: bool,
    resume: bool,
    on_stage: Callable[[str, int], object] | None,
    on_log: Callable[[str, str], object] | None,
) -> dict[int, dict[str, Path]]:
    """Train the families of several seeds from one base; returns the folders by seed and name."""
    chosen = settings or FamilySettings()
    tell = on_stage or (lambda name, seed: None)
    if len(pairs) < 2 or {"base", "mixed"} & set(pairs):
        raise OptionError(
            f"pairs: expected two objectives or more, none called 'base' or 'mixed', got {sorted(pairs)}. For a single "
            "objective, use train_reward_model."
        )
    if validation is not None and set(validation) != set(pairs):
        raise OptionError(f"validation: expected pairs of {sorted(pairs)}, got {sorted(validation)}.")
    if jobs < 1:
        raise OptionError(f"jobs: expected 1 or more, got {jobs}.")
    if not roots:
        return {}
    first_seed, first_root = next(iter(roots.items()))
    start = first_root / "base" if base is None else Path(base)
    trainings = [
        training for seed, root in roots.items() for training in _trainings(pairs, root, chosen, validation, seed)
    ]
    keeps = resume and not overwrite
    texts = sorted({pair.text("chosen") for part in pairs.values() for pair in part}) if base is None else []
    has_base = base is not None or (keeps and _is_trained_base(start, texts, chosen, first_seed))
    digest = digest_of_folder(start) if keeps and start.is_dir() else None
    missing = [
        training
        for training in trainings
        if not (keeps and _is_trained(training, None if base is None else start, digest))
    ]
    if jobs > 1:
        # Side by side, all end soon if the longest begins first; one seed after the other.
        missing.sort(key=lambda training: (list(roots).index(training.seed), -len(training.arguments["pairs"])))
    if missing:
        # Checked before the base is trained, which may take long.
        require_package("accelerate")
    for folder in [*([] if has_base else [start]), *(training.folder for training in missing)]:
        require_free(folder, overwrite)
    if not has_base:
        # With rejected texts too, the base could not learn which responses go with which prompts. The reward models
        # would have to learn it: on preference_world, harmlessness then takes twice as long.
        tell("base", first_seed)
        _train_family_base(texts, start, chosen, first_seed, progress, overwrite)
    # Kept until all models are trained, because the models have prompts in common.
    streams = None if chosen.reward_trained_layers is None else first_root / ".streams"
    run_side_by_side(
        [
            {
                **training.arguments,
                "base": str(start),
                "progress": progress,
                "overwrite": overwrite,
                "streams": streams,
                "work": training.folder.with_name(f"{training.name}-training") if keeps else None,
            }
            for training in missing
        ],
        [f"{training.name}, seed {training.seed}" for training in missing],
        jobs=jobs,
        on_start=lambda number: tell(missing[number].name, missing[number].seed),
        on_log=on_log or (lambda label, line: None),
    )
    if streams is not None:
        shutil.rmtree(streams, ignore_errors=True)
    return {
        seed: {"base": start, **{training.name: training.folder for training in trainings if training.seed == seed}}
        for seed in roots
    }


def reward_arguments(settings: FamilySettings) -> dict[str, Any]:
    """The arguments of `train_reward_model` among the settings: those that begin with `reward_`."""
    return {
        field.name.removeprefix("reward_"): getattr(settings, field.name)
        for field in fields(settings)
        if field.name.startswith("reward_")
    }


def _trainings(
    pairs: Mapping[str, PreferencePairs],
    root: Path,
    settings: FamilySettings,
    validation: Mapping[str, PreferencePairs] | None,
    seed: int,
) -> Iterator[_Training]:
    """One reward model per objective, and the mixed one."""
    mixtures: dict[str, dict[str, Any]] = {name: {"objective": name} for name in pairs}
    shares = {name: 1 / len(pairs) for name in pairs}
    mixtures["mixed"] = {"proportions": shares, "n_pairs": settings.mixed_pairs}
    for name, mixture in mixtures.items():
        held_out = validation if validation is None or name == "mixed" else {name: validation[name]}
        joined = None if held_out is None else PreferencePairs(pair for part in held_out.values() for pair in part)
        options = {
            **reward_arguments(settings),
            "seed": seed,
            "max_length": settings.max_length,
            "truncate_response": settings.truncate_response,
        }
        data = select_pairs(pairs, **mixture, seed=seed)
        yield _Training(name, {"pairs": data, "output_dir": root / name, "validation": joined, **options})


def _is_trained(training: _Training, base: Path | None, base_digest: str | None) -> bool:
    """Whether the folder holds this model; raises `StorageError` for another one.

    `base` is None if it is trained here; a hub name has no digest.
    """
    options = training.arguments
    validation = options["validation"]
    # As the record writes them, in JSON.
    compared = {
        name: str(value) if isinstance(value, torch.dtype) else value
        for name, value in options.items()
        if name not in ("pairs", "output_dir", "validation")
    }
    of_base: dict[str, Any] = {} if base is None else {"base": str(base)}
    if base_digest is not None:
        of_base = {"base_digest": base_digest}
    held_digest = None if validation is None else validation.digest
    return is_finished(training.folder, compared, data=options["pairs"].digest, validation=held_digest, **of_base)


def _is_trained_base(folder: Path, texts: Sequence[str], settings: FamilySettings, seed: int) -> bool:
    """Whether the folder holds this base; raises `StorageError` for another one."""
    if not folder.exists():
        return False
    options = {
        "seed": seed,
        "epochs": settings.base_epochs,
        "learning_rate": settings.base_learning_rate,
        "batch_size": settings.base_batch_size,
        "max_length": settings.max_length,
    }
    _, config = _new_base(texts, settings)
    return is_finished(folder, options, data=digest_of_texts(texts), config=digest_of_config(config))


def _train_family_base(
    texts: Sequence[str], folder: Path, settings: FamilySettings, seed: int, progress: bool | None, overwrite: bool
) -> None:
    tokenizer, config = _new_base(texts, settings)
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


def _new_base(texts: Sequence[str], settings: FamilySettings) -> tuple[Any, Any]:
    """The tokenizer of a base that is trained on these texts, and its config."""
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
    return tokenizer, config
