"""Training of reward models with TRL's `RewardTrainer`."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmtension.data._encoding import EncodedPairs, encode_pairs
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import DataError, ModelError, OptionError
from rmtension.store._provenance import digest_of_folder
from rmtension.training._model_checks import longest_text, require_pad_token, require_vocabulary
from rmtension.training._select_pairs import select_pairs
from rmtension.training._trainer_run import (
    arguments,
    isolated,
    new_folder,
    require_package,
    run_trainer,
    save_model,
    schedule,
    write_record,
)

_HEAD_STD = 0.02  # standard deviation of the weights of a new reward head, as in the paper


def train_reward_model(
    pairs: PreferencePairs | Mapping[str, PreferencePairs],
    base: Any,
    output_dir: str | Path,
    *,
    objective: str | None = None,
    proportions: Mapping[str, float] | None = None,
    n_pairs: int | None = None,
    validation: PreferencePairs | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    epochs: float = 1.0,
    max_steps: int | None = None,
    eval_steps: int | None = None,
    learning_rate: float = 1e-4,
    warmup_steps: int = 0,
    batch_size: int = 16,
    max_length: int | None = None,
    truncate_response: bool = False,
    dropout: bool = False,
    dtype: torch.dtype = torch.float32,
    progress: bool | None = None,
    overwrite: bool = False,
    trainer_options: Mapping[str, Any] | None = None,
) -> Path:
    """Train a reward model with TRL's `RewardTrainer` (Bradley-Terry loss, AdamW) and return its folder.

    Data. `pairs` are used as they are, or by objective (a dict, or the pairs' own labels): `objective="helpful"`
    selects one; `proportions={"helpful": 0.5, "harmless": 0.5}` draws a mixture of `n_pairs` (default: as many as the
    proportions allow). Training uses the same tokens as scoring (`rmtension.data.encode_pairs`): no eos is
    appended, no pair is dropped, and prompts are cut from the left to `max_length` tokens (default: the model's
    context, at most 1024). With `validation`, the checkpoint with the lowest validation loss is kept, of those taken
    every `eval_steps` steps (default: every epoch); it may share no prompt with the training pairs. Do not pass test
    pairs.

    Model. `base` is the folder (or hub name) of a language model or classifier, whose head, if any, is replaced by a
    new one, N(0, 0.02); or a transformers config, for new weights (then `tokenizer` is required). `dropout=True` keeps
    the base's dropout; by default all dropout is set to 0, as in TRL. Weights and optimiser states are float32;
    `dtype=torch.bfloat16` computes the forward and backward passes in that type.

    `seed` determines the mixture, the new weights, the order of the pairs and dropout; the caller's random states do
    not change. `max_steps` replaces `epochs`. `trainer_options` are further fields of `trl.RewardConfig`.

    The folder holds a checkpoint for `AutoModelForSequenceClassification`, its tokenizer, and
    `rmtension_training.json` (options, data digest, versions). It is written only when training has finished.
    `overwrite=True` replaces the folder of an earlier training. Raises `DataError`, `ModelError`, `OptionError` or
    `StorageError`. Runs in one process.

    Examples:
        >>> folder = train_reward_model(pairs, "organism", "helpful", objective="helpful", max_steps=1, progress=False)
        >>> RewardHead.from_pretrained(folder).score(["Human: a b c Assistant: d e"]).shape
        torch.Size([1])
        >>> sorted(path.name for path in folder.iterdir())[:3]
        ['config.json', 'model.safetensors', 'rmtension_training.json']
    """
    options = {
        name: value
        for name, value in locals().items()
        if name not in ("pairs", "base", "output_dir", "validation", "tokenizer", "progress", "overwrite")
    }
    trl = require_package("trl")
    if dtype not in (torch.float32, torch.bfloat16):
        raise OptionError(f"dtype: expected torch.float32 or torch.bfloat16, got {dtype}.")
    data = select_pairs(pairs, objective=objective, proportions=proportions, n_pairs=n_pairs, seed=seed)
    _require_disjoint(data, validation)
    with isolated(seed), new_folder(output_dir, overwrite) as (folder, scratch):
        model, tokenizer = _classifier(base, tokenizer, seed)
        limit = longest_text(model.config, max_length)
        sets = [
            encode_pairs(tokenizer, part, max_length=limit, truncate_response=truncate_response)
            for part in (data, validation)
            if part is not None
        ]
        selection = _selection(eval_steps) if validation is not None else {"save_strategy": "no"}
        config = arguments(
            trl.RewardConfig,
            trainer_options,
            **schedule(scratch, seed, epochs, max_steps, learning_rate, warmup_steps, batch_size, progress),
            **selection,
            bf16=dtype == torch.bfloat16,
            # transformers refuses bfloat16 on a CPU unless use_cpu is True.
            use_cpu=dtype == torch.bfloat16 and not (torch.cuda.is_available() or torch.backends.mps.is_available()),
            max_length=None,  # TRL silently drops longer pairs; these are cut already
            disable_dropout=not dropout,
        )
        tables = [_table(part) for part in sets]
        trainer = trl.RewardTrainer(
            model=model,
            args=config,
            train_dataset=tables[0],
            eval_dataset=tables[1] if validation is not None else None,
            processing_class=tokenizer,
        )
        result = run_trainer(trainer)
        save_model(folder, trainer.model, tokenizer)
        write_record(
            folder,
            kind="reward_model",
            base=str(base) if isinstance(base, (str, Path)) else type(base).__name__,
            base_digest=digest_of_folder(Path(base)) if isinstance(base, (str, Path)) and Path(base).is_dir() else None,
            options={**options, "max_length": limit},
            n_pairs=len(data),
            n_validation_pairs=0 if validation is None else len(validation),
            n_prompts_cut=sets[0].n_prompts_cut,
            n_responses_cut=sets[0].n_responses_cut,
            data=data.digest,
            result={**result, "best_validation_loss": trainer.state.best_metric},
        )
    return Path(output_dir)


def _require_disjoint(data: PreferencePairs, validation: PreferencePairs | None) -> None:
    shared = set() if validation is None else set(data.prompts) & set(validation.prompts)
    if shared:
        raise DataError(
            f"validation: {len(shared)} of its prompts are training prompts too. Divide the pairs with "
            "PreferencePairs.split, which splits by prompt."
        )
    if validation is not None and not len(validation):
        raise DataError("validation: expected at least one pair, got none. Leave it out to train without validation.")


def _classifier(base: Any, tokenizer: Any, seed: int) -> tuple[Any, Any]:
    """A sequence classifier in float32 with one new output, and its tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if isinstance(base, (str, Path)):
        try:
            tokenizer = tokenizer if tokenizer is not None else AutoTokenizer.from_pretrained(str(base))
            model, info = AutoModelForSequenceClassification.from_pretrained(
                str(base),
                num_labels=1,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # for a head with several outputs; any other mismatch raises below
                output_loading_info=True,
            )
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise ModelError(f"base: transformers could not load {base}: {error}. Check the path.") from error
        odd = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])} - {"score.weight", "score.bias"}
        if odd:
            raise ModelError(f"base: {base} lacks weights of {type(model).__name__}: {sorted(odd)[:4]}. Save it again.")
    else:
        if tokenizer is None:
            raise OptionError("tokenizer: required if base is a config, got None. train_tokenizer makes a small one.")
        config = copy.deepcopy(base)
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    require_pad_token(tokenizer)
    require_vocabulary(model, tokenizer)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    _draw_head(model, seed)
    return model, tokenizer


def _draw_head(model: Any, seed: int) -> None:
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise ModelError(
            f"base: expected a classifier with a linear layer 'score' with one output, got {type(model).__name__} with "
            f"{head}. Use a causal language model."
        )
    # With its own generator, the head depends on the seed and not on how many numbers loading has drawn.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * _HEAD_STD)
        if head.bias is not None:
            head.bias.zero_()


def _table(encoded: EncodedPairs) -> Any:
    """The columns that TRL recognises as tokenised."""
    columns = {"chosen_ids": encoded.chosen, "rejected_ids": encoded.rejected}
    return require_package("datasets").Dataset.from_dict(
        {name: [list(text.ids) for text in texts] for name, texts in columns.items()}
    )


def _selection(eval_steps: int | None) -> dict[str, Any]:
    """Keep the checkpoint with the lowest validation loss, in the scratch folder."""
    strategy = "epoch" if eval_steps is None else "steps"
    return {
        "eval_strategy": strategy,
        "save_strategy": strategy,
        "eval_steps": eval_steps,
        "save_steps": eval_steps or 500,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "save_only_model": True,
        "save_total_limit": 1,
    }
