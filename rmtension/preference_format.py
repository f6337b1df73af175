"""Preference pairs as rows of `datasets`, in TRL's formats: prompt explicit or implicit, texts or messages."""

from collections.abc import Iterable, Mapping
from typing import Any

from rmtension.errors import DataError, OptionError
from rmtension.pair import PreferencePair, join_prompt, split_transcripts, to_pair

_LABELS = ("objective", "subset", "item")


def read_row(row: Any, where: str, labels: Mapping[str, str]) -> PreferencePair:
    """The pair of a row, as `to_pair` reads it, and of two texts with an implicit prompt that are no HH transcripts.

    Where the prompt is explicit, TRL puts nothing between it and a response: the one space in front of a response is
    what `join_prompt` puts there, and is taken off.
    """
    if not isinstance(row, Mapping) or not all(isinstance(row.get(name), str) for name in ("chosen", "rejected")):
        return to_pair(row, where, labels)
    if "prompt" not in row:
        prompt, chosen, rejected = _split(row["chosen"], row["rejected"], where)
        return to_pair({**row, "prompt": prompt, "chosen": chosen, "rejected": rejected}, where, labels)
    if isinstance(row["prompt"], str):
        joined = {name: _without_gap(row["prompt"], row[name]) for name in ("chosen", "rejected")}
        return to_pair({**row, **joined}, where, labels)
    return to_pair(row, where, labels)


def to_rows(pairs: Iterable[PreferencePair], *, implicit_prompt: bool = False) -> list[dict[str, Any]]:
    """One dict a pair, such that TRL reads the texts that this library reads.

    Labels that no pair has are left out. Raises `DataError` where some prompts are texts and some are chats: a column
    has one type.
    """
    listed = list(pairs)
    kinds = {isinstance(pair.prompt, str) for pair in listed}
    if len(kinds) > 1:
        raise DataError(
            "pairs: some prompts are texts and some are chats, and a column of a data set has one type. Write them "
            "apart, or use pairs.as_chat()."
        )
    names = [name for name in _LABELS if any(getattr(pair, name) is not None for pair in listed)]
    return [
        {**_fields(pair, implicit_prompt), "id": pair.id, **{name: getattr(pair, name) for name in names}}
        for pair in listed
    ]


def require_rows(dataset: Any) -> Iterable[Any]:
    """The data set itself; raises `OptionError` for several splits, and for what has no rows."""
    if isinstance(dataset, Mapping):
        raise OptionError(
            f"dataset: expected one split, got a mapping of {list(map(str, dataset))}. Name one: dataset['train']."
        )
    if not isinstance(dataset, Iterable) or isinstance(dataset, str | bytes):
        raise OptionError(
            f"dataset: expected a datasets.Dataset, got {type(dataset).__name__}. A name on the hub goes to "
            "PreferencePairs.from_hub."
        )
    return dataset


def require_datasets() -> Any:
    """The package `datasets`; raises `DataError` that says how to install it."""
    try:
        import datasets
    except ImportError as error:
        raise DataError("to_dataset: needs the package 'datasets'. Install it with `pip install datasets`.") from error
    return datasets


def _fields(pair: PreferencePair, implicit_prompt: bool) -> dict[str, Any]:
    if isinstance(pair.prompt, str):
        whole = {name: pair.text(name) for name in ("chosen", "rejected")}
        if implicit_prompt:
            return whole
        return {"prompt": pair.prompt, **{name: text[len(pair.prompt) :] for name, text in whole.items()}}
    prompt = [message._asdict() for message in pair.prompt]
    answers = {name: [{"role": "assistant", "content": getattr(pair, name)}] for name in ("chosen", "rejected")}
    if implicit_prompt:
        return {name: [*prompt, *answer] for name, answer in answers.items()}
    return {"prompt": prompt, **answers}


def _without_gap(prompt: str, response: str) -> str:
    shorter = response.removeprefix(" ")
    return shorter if join_prompt(prompt, shorter) == prompt + response else response


def _split(chosen: str, rejected: str, where: str) -> tuple[str, str, str]:
    """Prompt and responses of two texts: at the last shared turn of the assistant, or behind the last shared space.

    Words are not cut: what both responses begin with is in the prompt as far as its last space.
    """
    try:
        return split_transcripts(chosen, rejected)
    except DataError:
        pass
    # At least a word is left for both responses.
    shortest = min(len(chosen.rstrip()), len(rejected.rstrip()))
    shared = next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest - 1)
    end = next((i for i in range(shared, 0, -1) if chosen[i - 1].isspace()), 0)
    prompt = chosen[:end]
    if not prompt.strip():
        raise DataError(
            f"{where}: field 'prompt' is missing, and 'chosen' and 'rejected' begin with no word that both have, so "
            "that no prompt is in them. Rename the column that holds the prompt to 'prompt'."
        )
    parts = chosen[end:], rejected[end:]
    if all(join_prompt(prompt[:-1], part) == prompt + part for part in parts):
        prompt = prompt[:-1]  # a space that the join puts back
    return prompt, *parts
