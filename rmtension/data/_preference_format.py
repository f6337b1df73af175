"""Preference pairs as rows of `datasets`, in TRL's formats: explicit or implicit prompt, texts or messages."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rmtension.data._chat import Chat, Message
from rmtension.data._data_files import without_padding
from rmtension.data._pair import PreferencePair
from rmtension.errors import DataError, OptionError

_LABELS = ("objective", "subset", "item", "tools")


def dataset_rows(dataset: Any) -> Iterator[tuple[str, Any]]:
    """Yield the rows of one split as (where, row); raises `OptionError` for several splits or anything without rows."""
    if isinstance(dataset, Mapping):
        raise OptionError(
            f"dataset: expected one split, got a mapping of {list(map(str, dataset))}. Choose one, for example "
            "dataset['train']."
        )
    if not isinstance(dataset, Iterable) or isinstance(dataset, str | bytes):
        raise OptionError(
            f"dataset: expected a datasets.Dataset, got {type(dataset).__name__}. Load a data set by its name on the "
            "hub with PreferencePairs.from_hub."
        )
    # Fields of type Json are not padded; Arrow's structs are.
    features = getattr(dataset, "features", None)
    is_padded = features is not None and "Json" not in str(features)
    for number, row in enumerate(dataset):
        if is_padded and isinstance(row, Mapping):
            row = {name: without_padding(value) for name, value in row.items()}
        yield f"row {number}", row


def to_dataset(pairs: Sequence[PreferencePair], *, implicit_prompt: bool = False) -> Any:
    """A `datasets.Dataset` of `to_rows`."""
    datasets = _require_datasets()
    rows = to_rows(pairs, implicit_prompt=implicit_prompt)
    chats = [chat for pair in pairs for chat in (pair.prompt, pair.chosen, pair.rejected) if isinstance(chat, tuple)]
    if not any(message.more for chat in chats for message in chat) or not hasattr(datasets, "Json"):
        return datasets.Dataset.from_list(rows)
    # Columns of structs would pad every message with the fields of all others.
    kinds = {name: datasets.List(datasets.Json()) for name in ("prompt", "chosen", "rejected")}
    features = {name: kinds.get(name, datasets.Value("string")) for name in rows[0]}
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def to_rows(pairs: Iterable[PreferencePair], *, implicit_prompt: bool = False) -> list[dict[str, Any]]:
    """One dict per pair, from which TRL builds the same texts as this library.

    Labels that no pair has are left out. Raises `DataError` if some prompts are texts and some are chats, because a
    column has one type.
    """
    listed = list(pairs)
    kinds = {isinstance(pair.prompt, str) for pair in listed}
    if len(kinds) > 1:
        raise DataError(
            "pairs: expected prompts of one type, got both texts and chats; a column of a data set has one type. Write "
            "them to separate data sets, or convert all with pairs.as_chat()."
        )
    names = [name for name in _LABELS if any(getattr(pair, name) is not None for pair in listed)]
    return [
        {**_fields(pair, implicit_prompt), "id": pair.id, **{name: getattr(pair, name) for name in names}}
        for pair in listed
    ]


def _require_datasets() -> Any:
    """Import `datasets`; raises `DataError` that says how to install it."""
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
    prompt = _messages(pair.prompt)
    answers = {name: _messages(getattr(pair, name)) for name in ("chosen", "rejected")}
    if implicit_prompt:
        return {name: [*prompt, *answer] for name, answer in answers.items()}
    return {"prompt": prompt, **answers}


def _messages(chat: str | Chat) -> list[dict[str, Any]]:
    listed = (Message("assistant", chat),) if isinstance(chat, str) else chat
    return [message.to_dict() for message in listed]
