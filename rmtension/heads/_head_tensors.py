"""The tensors of a checkpoint that may belong to a head, told from those of the body by their names."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from rmtension.errors import ModelError

# How families name their embedding; its name begins with the name of the body in the checkpoint.
_EMBEDDING = re.compile(r"(?:^|\.)(embed_tokens|wte|wpe|embed_in|word_embeddings|tok_embeddings|tokens_embed)\.weight$")
# First parts of names in a body that was saved without a name of its own, and of an unembedding.
_BODY = {"layers", "h", "blocks", "decoder", "encoder", "norm", "ln_f", "final_layer_norm", "emb_layer_norm"}
_UNEMBEDDINGS = {"lm_head", "embed_out", "output"}
_TOWERS = {"visual", "vision_tower", "vision_model", "multi_modal_projector"}


@dataclass(frozen=True)
class HeadTensors:
    """Tensors that may belong to a head: their shapes by name, and the file of each, or the tensors themselves."""

    shapes: Mapping[str, tuple[int, ...]]
    held: Mapping[str, Tensor | Path]

    @classmethod
    def of(cls, given: Mapping[Any, Any]) -> "HeadTensors":
        """The tensors of a state dict in memory."""
        tensors = {str(name): tensor for name, tensor in given.items() if isinstance(tensor, Tensor)}
        return cls({name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors with these names."""
        read: dict[str, Tensor] = {}
        for name in names:
            held = self.held[name]
            if isinstance(held, Path):
                with damage_named(held), safe_open(held, framework="pt") as opened:
                    read[name] = opened.get_tensor(name)
            else:
                read[name] = held
        return read

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, by the rest of their names."""
        names = [name for name in self.shapes if name.startswith(prefix)]
        return {name.removeprefix(prefix): tensor for name, tensor in self.read(names).items()}


def body_prefix(names: Iterable[str]) -> str:
    """What the names of the body's tensors begin with, such as "model.": the first part of the embedding's name."""
    embeddings = [name for name in names if _EMBEDDING.search(name)]
    firsts = {name.partition(".")[0] for name in embeddings if not _EMBEDDING.match(name)}
    return f"{min(firsts)}." if firsts and not firsts & _BODY else ""


def text_prefix(names: Iterable[str]) -> str:
    """The same for a language model inside another model, with all parts: "model.language_model."."""
    found = [match for name in names if (match := _EMBEDDING.search(name))]
    return min((match.string[: match.start(1)] for match in found), default="", key=len)


def names_outside(names: Iterable[str], *, unembedding: bool = False) -> list[str]:
    """The names of the tensors outside the body, without towers for images."""
    names = list(names)
    prefix = body_prefix(names)
    unnamed = _BODY | {name.partition(".")[0] for name in names if _EMBEDDING.match(name)}
    inside = {prefix.removesuffix(".")} if prefix else unnamed
    inside = inside | _TOWERS | (set() if unembedding else _UNEMBEDDINGS)
    return sorted(name for name in names if name.partition(".")[0] not in inside)


@contextmanager
def damage_named(name: str | Path) -> Iterator[None]:
    """Errors of reading safetensors files become a `ModelError` that names the checkpoint."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise ModelError(
            f"{name}: its safetensors files are damaged or incomplete ({error}). Download them again."
        ) from error
