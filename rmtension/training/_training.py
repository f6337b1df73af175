"""Training of reward models, and of the base model they start from, with TRL and transformers (extra `train`)."""

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmtension.data._encoding import EncodedPairs, encode_pairs
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import DataError, ModelError, OptionError
from rmtension.store._provenance import digest_of_folder
from rmtension.training._trainer_run import (
    arguments,
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

HEAD_STD = 0.02  # standard deviation of the weights of a new reward head, as in the paper
_LONGEST = 1024  # tokens, unless the caller or the model's context sets another limit; as in the paper


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
        limit = _context(model.config, max_length)
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

    With `resume`, a model that a run with the same texts and options left in `output_dir` is kept; a difference raises
    `StorageError`. Configs are not compared.

    Examples:
        >>> from transformers import GPT2Config
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
    _require_pad_token(tokenizer)
    limit = _context(config, max_length)
    options |= {"max_length": limit}
    if resume and not overwrite and is_finished(Path(output_dir), options, data=digest_of_texts(texts)):
        return Path(output_dir)
    from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments

    with isolated(seed), new_folder(output_dir, overwrite) as (folder, scratch):
        config = copy.deepcopy(config)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _require_vocabulary(model, tokenizer)
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
            data=digest_of_texts(texts),
            result=result,
        )
    return Path(output_dir)


def train_tokenizer(
    texts: Sequence[str],
    vocab_size: int,
    *,
    eos_token: str = "<|endoftext|>",  # noqa: S107 - text tokens, not passwords
    pad_token: str = "<|pad|>",  # noqa: S107
    max_length: int | None = None,
) -> Any:
    """Train a byte-level BPE tokenizer on `texts`, with separate eos and pad tokens.

    `vocab_size` includes the 256 bytes, eos and pad, so it is at least 258. The same texts give the same tokenizer.
    Raises `OptionError` for a smaller vocabulary, or if eos and pad are the same token.

    Examples:
        >>> tokenizer = train_tokenizer(["hello hello"], 260)
        >>> tokenizer.decode(tokenizer("hello hello")["input_ids"])
        'hello hello'
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 258:
        raise OptionError(f"vocab_size: expected at least 258 (256 bytes, eos and pad), got {vocab_size}.")
    if eos_token == pad_token:
        raise OptionError(f"pad_token: expected another token than eos, got {pad_token!r} for both.")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eos_token, pad_token],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    length = {} if max_length is None else {"model_max_length": max_length}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos_token,
        pad_token=pad_token,
        clean_up_tokenization_spaces=False,
        **length,
    )


def select_pairs(
    pairs: PreferencePairs | Mapping[str, PreferencePairs],
    *,
    objective: str | None = None,
    proportions: Mapping[str, float] | None = None,
    n_pairs: int | None = None,
    seed: int = 0,
) -> PreferencePairs:
    """The pairs that `train_reward_model` trains on: all, those of one objective, or a mixture by `proportions`.

    Proportions are positive, sum to 1 and hold up to rounding (largest remainder). `seed` determines the draw. Raises
    `OptionError` for invalid or unknown objectives and proportions, `DataError` for too few pairs.

    Examples:
        >>> len(select_pairs(pairs, proportions={"helpful": 0.75, "harmless": 0.25}))
        32
    """
    if objective is not None and proportions is not None:
        raise OptionError("objective, proportions: expected one of the two, got both. Leave one out.")
    if isinstance(pairs, PreferencePairs):
        if objective is None and proportions is None:
            return _drawn(pairs, n_pairs, seed, "pairs")
        pairs = {name: pairs.filter(objective=name) for name in pairs.objectives}
    if objective is None and proportions is None:
        raise OptionError(
            f"pairs: got a mapping with the objectives {sorted(pairs)}. Pass objective=... to train on one, or "
            "proportions={...} to mix several."
        )
    unknown = {objective} - set(pairs) if proportions is None else set(proportions) - set(pairs)
    if unknown:
        raise OptionError(f"objective, proportions: expected some of {sorted(pairs)}, got {sorted(map(str, unknown))}.")
    if proportions is None:
        return _drawn(pairs[str(objective)], n_pairs, seed, f"{objective} pairs")
    if min(proportions.values(), default=0.0) <= 0 or not math.isclose(sum(proportions.values()), 1, abs_tol=1e-6):
        raise OptionError(f"proportions: expected positive numbers that sum to 1, got {dict(proportions)}.")
    # Without 1e-9, rounding errors would turn 0.1 * 30 into 2.
    most = math.floor(min(len(pairs[name]) / share for name, share in proportions.items()) + 1e-9)
    total = most if n_pairs is None else n_pairs
    if not 0 < total <= most:
        raise DataError(f"n_pairs: expected 1 to {most}, the most these proportions allow, got {total}.")
    exact = {name: total * share for name, share in proportions.items()}
    counts = {name: math.floor(value + 1e-9) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: counts[name] - exact[name])[: total - sum(counts.values())]:
        counts[name] += 1
    parts = [pairs[name].sample(count, seed=seed) for name, count in counts.items() if count]
    return PreferencePairs(pair for part in parts for pair in part)


def _drawn(pairs: PreferencePairs, n_pairs: int | None, seed: int, name: str) -> PreferencePairs:
    if not len(pairs) or (n_pairs is not None and not 0 < n_pairs <= len(pairs)):
        raise DataError(
            f"n_pairs: expected a number from 1 to the number of {name}, which is {len(pairs)}, got {n_pairs}."
        )
    return pairs if n_pairs is None else pairs.sample(n_pairs, seed=seed)


def _require_disjoint(data: PreferencePairs, validation: PreferencePairs | None) -> None:
    shared = set() if validation is None else set(data.prompts) & set(validation.prompts)
    if shared:
        raise DataError(
            f"validation: {len(shared)} of its prompts are training prompts too. Divide the pairs with "
            "PreferencePairs.split, which splits by prompt."
        )
    if validation is not None and not len(validation):
        raise DataError("validation: expected at least one pair, got none. Leave it out to train without validation.")


def _require_pad_token(tokenizer: Any) -> None:
    if tokenizer.pad_token_id is None:
        raise ModelError(
            "tokenizer: expected a pad token, got None. The token that the reward is read from depends on it "
            "(transformers skips trailing pad tokens). Set tokenizer.pad_token, best to a token that no text contains, "
            "and pass tokenizer=..."
        )


def _require_vocabulary(model: Any, tokenizer: Any) -> None:
    n_rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > n_rows:
        raise ModelError(
            f"tokenizer: it has {len(tokenizer)} tokens, but the model's embedding {n_rows} rows. Use the model's own "
            "tokenizer, or resize the embedding first."
        )


def _context(config: Any, max_length: int | None) -> int:
    """The largest number of tokens per text."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    limit = max_length if max_length is not None else min(_LONGEST, context or _LONGEST)
    if limit < 1 or limit > (context or limit):
        raise OptionError(f"max_length: expected 1 to {context} (the model's context), got {limit}.")
    return int(limit)


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
    _require_pad_token(tokenizer)
    _require_vocabulary(model, tokenizer)
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
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * HEAD_STD)
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
