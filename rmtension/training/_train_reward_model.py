"""Training of reward models: the Bradley-Terry loss on packed pairs, by transformers' `Trainer`."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmtension._arguments import require_choice
from rmtension.bodies._native_run import measure_packing
from rmtension.data._encoding import encode_pairs
from rmtension.data._packing import pair_collator, prompt_batches
from rmtension.data._pairs import PreferencePairs
from rmtension.data._token_places import ReadAt
from rmtension.data._tokens import TokenBatch
from rmtension.errors import DataError, OptionError
from rmtension.evaluation._length import length_weights
from rmtension.store._provenance import digest_of_folder, digest_of_tokenizer
from rmtension.training._frozen_layers import FrozenLayers
from rmtension.training._model_checks import longest_text
from rmtension.training._new_classifier import new_classifier
from rmtension.training._select_pairs import select_pairs
from rmtension.training._trainer_run import (
    arguments,
    evaluate_at_the_end,
    isolated,
    last_checkpoint,
    new_folder,
    require_package,
    run_trainer,
    save_model,
    schedule,
    stop_after,
    write_record,
)

_NO_OPTION = ("streams", "work", "on_log")
# What the trainer is told to keep the best checkpoint.
_SELECT_BY: dict[str, dict[str, Any]] = {
    "loss": {"metric_for_best_model": "eval_loss", "greater_is_better": False},
    "accuracy": {"metric_for_best_model": "eval_accuracy", "greater_is_better": True},
}
# How often a training logs, and saves its state if it has a work folder.
_N_LOGS, _N_SAVES = 20, 10


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
    balance_length: bool = False,
    share_prompts: bool = False,
    trained_layers: int | None = None,
    streams: str | Path | None = None,
    patience: int | None = None,
    select_by: str = "loss",
    dropout: bool = False,
    dtype: torch.dtype = torch.float32,
    progress: bool | None = None,
    overwrite: bool = False,
    work: str | Path | None = None,
    on_log: Callable[[str], object] | None = None,
    trainer_options: Mapping[str, Any] | None = None,
) -> Path:
    """Train a reward model with the Bradley-Terry loss and AdamW, and return its folder.

    Data. `pairs` are used as they are, or by objective (a dict, or the pairs' own labels): `objective="helpful"`
    selects one; `proportions={"helpful": 0.5, "harmless": 0.5}` draws a mixture of `n_pairs` (default: as many as the
    proportions allow). Training uses the same tokens as scoring (`rmtension.data.encode_pairs`): no eos is
    appended, no pair is dropped, and prompts are cut from the left to `max_length` tokens (default: the model's
    context, at most 1024). `balance_length` weights the pairs by `evaluation.length_weights`, so that preferring the
    longer or the shorter response gains nothing.

    Steps. A step takes `batch_size` pairs at random, and a pair's prompt runs once. With `share_prompts`, the pairs of
    one prompt are in one step, where the prompt and each distinct response run once, together with prompts of similar
    length; steps then have up to `batch_size` pairs. `max_steps` replaces `epochs`. With `validation`, the checkpoint
    with the lowest validation loss is kept, or with `select_by="accuracy"` the one with the highest accuracy, of those
    taken every `eval_steps` steps (default: every epoch) and at the end. Training stops after `patience` of them
    without a better one. Validation pairs must not share a prompt with the training pairs. Do not pass test pairs.

    Model. `base` is the folder (or hub name) of a language model or classifier, whose head, if any, is replaced by a
    new one, N(0, 0.02); or a transformers config, for new weights (then `tokenizer` is required). `dropout=True` keeps
    the base's dropout; by default all dropout is set to 0. Weights and optimiser states are float32;
    `dtype=torch.bfloat16` computes the forward and backward passes in that type. `trained_layers=k` trains the last k
    layers, the final norm and the head. The layers below are frozen, run once per prompt before training, without
    dropout, and their output is kept: in memory (d_model x 4 bytes per token), or as files in `streams`, a folder that
    several trainings from one base can share.

    `seed` determines the mixture, the new weights, the order of the pairs and dropout; the caller's random states do
    not change. `trainer_options` are further fields of `transformers.TrainingArguments`. `on_log` is called with a
    line about the loss and the validation twenty times in a training.

    The folder holds a checkpoint for `AutoModelForSequenceClassification`, its tokenizer, and
    `rmtension_training.json` (options, data digest, losses, versions). It is written only when training has finished.
    `overwrite=True` replaces the folder of an earlier training. With a `work` folder, the state of the training is
    saved there ten times, or at every validation, and the same call after an interruption continues from the last one,
    with the same result as without the interruption. Raises `DataError`, `ModelError`, `OptionError` or
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
        if name not in ("pairs", "base", "output_dir", "validation", "tokenizer", "progress", "overwrite", *_NO_OPTION)
    }
    require_package("accelerate")
    from transformers import TrainingArguments

    from rmtension.training._reward_trainer import RewardTrainer

    if dtype not in (torch.float32, torch.bfloat16):
        raise OptionError(f"dtype: expected torch.float32 or torch.bfloat16, got {dtype}.")
    if patience is not None and (validation is None or patience < 1):
        given = "without" if validation is None else "with"
        raise OptionError(
            f"patience: expected a number from 1, and validation pairs, got {patience} {given} validation pairs. Pass "
            "validation=..., or leave it out."
        )
    require_choice("select_by", select_by, _SELECT_BY)
    if streams is not None and trained_layers is None:
        raise OptionError("streams: they are kept for frozen layers only. Pass trained_layers=..., or leave it out.")
    data = select_pairs(pairs, objective=objective, proportions=proportions, n_pairs=n_pairs, seed=seed)
    _require_disjoint(data, validation)
    digest = digest_of_folder(Path(base)) if isinstance(base, (str, Path)) and Path(base).is_dir() else None
    held_digest = None if validation is None else validation.digest
    origin = digest or _origin(base, seed)
    inputs = {
        **options,
        "data": data.digest,
        "validation": held_digest,
        "base": origin,
        "tokenizer": digest_of_tokenizer(tokenizer),
    }
    with isolated(seed), new_folder(output_dir, overwrite, work, inputs) as (folder, scratch):
        model, tokenizer = new_classifier(base, tokenizer, seed=seed)
        limit = longest_text(model.config, max_length)
        frozen = None
        if trained_layers is not None:
            kept = None if streams is None else Path(streams) / f"{origin[:16]}-{trained_layers}"
            frozen = FrozenLayers(model.base_model, trained_layers, kept)
        if not dropout:
            remove_dropout(model)
        sets = [
            encode_pairs(tokenizer, part, max_length=limit, truncate_response=truncate_response)
            for part in (data, validation)
            if part is not None
        ]
        read_at = ReadAt(tokenizer.pad_token_id)
        pack_up_to = measure_packing(model.base_model, model.get_input_embeddings().weight.shape[0], limit)
        packing: dict[str, Any] = {"read_at": read_at, "pack_up_to": pack_up_to}
        collate: Callable[[Sequence[int]], TokenBatch] = pair_collator(sets[0], **packing)
        n_items, per_step = len(data), batch_size
        if share_prompts:
            batches = prompt_batches(sets[0], pairs_per_batch=batch_size, seed=seed, **packing)
            collate, n_items, per_step = (lambda numbers: batches[numbers[0]]), len(batches), 1
        items = [collate([number]) for number in range(n_items)]
        held_out = [prompt_batches(part, pairs_per_batch=batch_size, **packing) for part in sets[1:]]
        if frozen is not None:
            frozen.prepare([*items, *chain(*held_out)], progress=progress)
        weights = [
            length_weights(part) if balance_length else torch.ones(len(part)).double()
            for part in (data, validation)
            if part is not None
        ]
        n_steps = max_steps or math.ceil(math.ceil(n_items / per_step) * epochs)
        config = arguments(
            TrainingArguments,
            trainer_options,
            **schedule(scratch, seed, epochs, max_steps, learning_rate, warmup_steps, per_step, progress),
            **_saving(n_steps, validation is not None, eval_steps, _SELECT_BY[select_by], work is not None),
            logging_steps=max(1, n_steps // _N_LOGS),
            restore_callback_states_from_checkpoint=True,
            bf16=dtype == torch.bfloat16,
            # transformers refuses bfloat16 on a CPU unless use_cpu is True.
            use_cpu=dtype == torch.bfloat16 and not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        )
        validating: dict[str, Any] = {"validation": held_out[0], "validation_weights": weights[1]} if held_out else {}
        trainer = RewardTrainer(
            model,
            config,
            n_items=n_items,
            collate=collate,
            weights=weights[0],
            frozen=frozen,
            processing_class=tokenizer,
            callbacks=[
                *([evaluate_at_the_end()] if held_out else []),
                *([stop_after(patience)] if patience is not None else []),
            ],
            **validating,
        )
        result = run_trainer(trainer, on_log, resume_from=last_checkpoint(scratch))
        save_model(folder, trainer.model, tokenizer)
        write_record(
            folder,
            kind="reward_model",
            base=str(base) if isinstance(base, (str, Path)) else type(base).__name__,
            base_digest=digest,
            options={**options, "max_length": limit},
            n_pairs=len(data),
            n_validation_pairs=0 if validation is None else len(validation),
            n_prompts_cut=sets[0].n_prompts_cut,
            n_responses_cut=sets[0].n_responses_cut,
            n_tokens=sets[0].n_tokens,
            n_tokens_run=sum(int(batch.position_mask("all").sum()) for batch in items),
            data=data.digest,
            validation=held_digest,
            result={**result, "best_step": trainer.state.best_global_step},
        )
    return Path(output_dir)


def _origin(base: Any, seed: int) -> str:
    """A digest that identifies a base without a folder: the hub name, or the config with the seed of its weights."""
    about = str(base) if isinstance(base, (str, Path)) else f"{base.to_json_string()} {seed}"
    return hashlib.sha256(about.encode()).hexdigest()


def _require_disjoint(data: PreferencePairs, validation: PreferencePairs | None) -> None:
    shared = set() if validation is None else set(data.prompts) & set(validation.prompts)
    if shared:
        raise DataError(
            f"validation: {len(shared)} of its prompts are training prompts too. Divide the pairs with "
            "PreferencePairs.split, which splits by prompt."
        )
    if validation is not None and not len(validation):
        raise DataError("validation: expected at least one pair, got none. Leave it out to train without validation.")


def remove_dropout(model: nn.Module) -> None:
    """Set all dropout of a model to 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # transformers' attention reads its own probability.
        for name in ("attention_dropout", "attn_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _saving(
    n_steps: int, selects: bool, eval_steps: int | None, best: Mapping[str, Any], resumes: bool
) -> dict[str, Any]:
    """When checkpoints are written: to keep the best on validation pairs, and to resume."""
    if not selects:
        often = max(1, math.ceil(n_steps / _N_SAVES))
        return (
            {"save_strategy": "steps", "save_steps": often, "save_total_limit": 1}
            if resumes
            else {"save_strategy": "no"}
        )
    strategy = "epoch" if eval_steps is None else "steps"
    return {
        "eval_strategy": strategy,
        "save_strategy": strategy,
        "eval_steps": eval_steps,
        "save_steps": eval_steps or 500,
        "load_best_model_at_end": True,
        **best,
        "save_only_model": not resumes,
        "save_total_limit": 1,
    }
