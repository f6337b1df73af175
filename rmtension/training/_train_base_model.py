"""Training of the base model that reward models start from, with transformers' `Trainer`."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rmtension.errors import DataError
from rmtension.training._model_checks import longest_text, require_pad_token, require_vocabulary
from rmtension.training._trainer_run import (
    arguments,
    digest_of_config,
    digest_of_texts,
    is_finished,
    isolated,
    new_folder,
    require_package,
    run_trainer,
    save_model,
    schedule,
    write_record,
)


def train_base_model(
    texts: Sequence[str],
    config: Any,
    tokenizer: Any,
    output_dir: str | Path,
    *,
    seed: int = 0,
    epochs: float = 1.0,
    max_steps: int | None = None,
    learning_rate: float = 1e-3,
    warmup_steps: int = 0,
    batch_size: int = 16,
    max_length: int | None = None,
    progress: bool | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Path:
    """Train a causal language model from fresh weights with transformers' `Trainer` and return its folder.

    `config` is a transformers config; its special-token ids are set to those of the tokenizer. The tokenizer's eos is
    appended to every text; a text longer than `max_length` tokens (default: the context, at most 1024) is divided into
    consecutive pieces. Seed, folder and errors are as for `train_reward_model`.

    With `resume`, a model that a run with the same texts, config and options left in `output_dir` is kept; a difference
    raises `StorageError`.

    Examples:
        >>> from transformers import GPT2Config
        >>> from rmtension.training import train_tokenizer
        >>> texts = [pair.text("chosen") for pair in pairs["helpful"]]
        >>> tokenizer = train_tokenizer(texts, 300)
        >>> config = GPT2Config(n_layer=1, n_embd=8, n_head=1, n_positions=64, vocab_size=300)
        >>> train_base_model(texts, config, tokenizer, "base", max_steps=1, progress=False).name
        'base'
    """
    options = {"seed": seed, "epochs": epochs, "max_steps": max_steps, "learning_rate": learning_rate}
    options |= {"warmup_steps": warmup_steps, "batch_size": batch_size}
    require_package("accelerate")
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise DataError("texts: expected at least one text, and no empty ones. Leave empty texts out.")
    require_pad_token(tokenizer)
    limit = longest_text(config, max_length)
    options |= {"max_length": limit}
    digests = {"data": digest_of_texts(texts), "config": digest_of_config(config)}
    if resume and not overwrite and is_finished(Path(output_dir), options, **digests):
        return Path(output_dir)
    from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments

    with isolated(seed), new_folder(output_dir, overwrite) as (folder, scratch):
        config = copy.deepcopy(config)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        require_vocabulary(model, tokenizer)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        encoded = [[*ids, *end] for ids in tokenizer(list(texts), verbose=False)["input_ids"]]
        rows = [{"input_ids": ids[i : i + limit]} for ids in encoded for i in range(0, len(ids), limit)]
        common = schedule(scratch, seed, epochs, max_steps, learning_rate, warmup_steps, batch_size, progress)
        trainer = Trainer(
            model=model,
            args=arguments(TrainingArguments, None, **common, save_strategy="no"),
            train_dataset=rows,  # Trainer takes any sequence
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        result = run_trainer(trainer)
        save_model(folder, trainer.model, tokenizer)
        write_record(
            folder,
            kind="base_model",
            options=options,
            n_texts=len(texts),
            **digests,
            result=result,
        )
    return Path(output_dir)
