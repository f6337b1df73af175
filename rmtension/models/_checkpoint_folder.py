"""Writing a checkpoint into a folder, whole or not at all, in place of an earlier one."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from rmtension._progress import without_unseen_bars
from rmtension.errors import ModelError
from rmtension.models._head_files import VALUE_HEAD
from rmtension.models._lens_models import CONFIG_FILE
from rmtension.models._portable import make_portable, warn_of
from rmtension.store._files import filled_whole

# Files of an earlier checkpoint in the folder, which would be read instead of the new ones.
_OTHERS = (
    *("model.safetensors", "model.safetensors.index.json", VALUE_HEAD),
    *("chat_template.jinja", "special_tokens_map.json", "added_tokens.json"),
)


def write_checkpoint(model: Any, state: Mapping[str, Tensor], tokenizer: Any, folder: Path) -> None:
    """Write a model of transformers with the parameters `state`, and its tokenizer, in place of a checkpoint.

    Warns if transformers 4 computes other rewards with it.
    """
    with checkpoint_folder(folder) as temporary:
        model.save_pretrained(temporary, state_dict=dict(state))
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        differences = make_portable(temporary, tokenizer)
    warn_of(differences, "save_pretrained")


def require_no_adapter(folder: Path) -> None:
    """Raise `ModelError` for a folder with an adapter, which transformers would attach to the saved model."""
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"folder: expected a folder without an adapter, but {folder} has an adapter_config.json, which "
            "transformers would attach to the saved model. Use another folder."
        )


@contextmanager
def checkpoint_folder(folder: Path) -> Iterator[Path]:
    """`filled_whole` for a checkpoint, in which errors of the file system that safetensors reports are `OSError`s."""
    with filled_whole(folder, "checkpoint", seal="config.json", replaced=(*_OTHERS, CONFIG_FILE)) as temporary:
        try:
            with without_unseen_bars():
                yield temporary
        except SafetensorError as error:
            # safetensors reports the error of the file system only as text: "... (os error 28)".
            code = re.search(r"\(os error (\d+)\)", str(error))
            raise OSError(int(code[1]) if code else 0, str(error)) from error
