"""Tiny replicas of published reward models: a small body, the tensors and the config of one kind, and its formula.

`Replica.forward` is the kind's own forward pass after the body, in plain torch, for one text. To add a kind, add an
entry to a list of replicas; `kind_checks` measures whatever it gets.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from rmtension import PreferencePairs

WORDS = [f"w{number}" for number in range(24)]
# What a replica's tokenizer calls the special tokens of each body, by id: the ids of the real models.
HEADERS = {
    "llama": {"<|eot_id|>": 128009, "<|start_header_id|>": 128006, "assistant": 78191, "<|end_header_id|>": 128007},
    "gemma2": {"<end_of_turn>": 107, "NL": 108, "<start_of_turn>": 106, "model": 2516},
}
HEADER = {
    "llama": "<|eot_id|> <|start_header_id|> assistant <|end_header_id|> NL",
    "gemma2": "<end_of_turn> NL <start_of_turn> model NL",
}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
BODIES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64},
    "gpt_neox": {"num_key_value_heads": None},
}


@dataclass(frozen=True)
class Replica:
    """One kind of reward model.

    Attributes:
        kind: its name in tables.
        models: published models of this kind.
        forward: (last hidden states [token, d_model] after the final norm, token ids, tensors, config) -> all outputs.
        tensors: makes the head's tensors, by their published names.
        body: the model type of the body.
        fields: what the published config.json has besides the body's fields, and instead of them.
        prefix: what the names of the body's tensors begin with.
        options: how it is opened.
        chosen: the output that is the reward, or two for a difference.
        separate: the file that the head is stored in; None for the model's own file.
        passed: whether the head's tensors are passed as head=, in a file, and not stored with the body.
        head: makes the head that is passed as head= from the stored tensors.
        unembedding: whether the checkpoint has an unembedding of its own.
        reopened: how it is opened after it was saved; by default with `options`.
        as_classifier: whether it is saved as a classifier of transformers.
        header: whether texts have the header of an assistant turn, so that the vocabulary has its ids.
    """

    kind: str
    models: str
    forward: Callable[[torch.Tensor, list[int], dict[str, torch.Tensor], dict[str, Any]], torch.Tensor]
    tensors: Callable[[Callable[..., torch.Tensor]], dict[str, torch.Tensor]]
    body: str = "llama"
    fields: dict[str, Any] = field(default_factory=dict)
    prefix: str = "model."
    options: dict[str, Any] = field(default_factory=dict)
    chosen: tuple[int, ...] = (0,)
    separate: str | None = None
    passed: bool = False
    head: Callable[[dict[str, torch.Tensor]], Any] | None = None
    unembedding: bool = False
    reopened: dict[str, Any] | None = None
    as_classifier: bool = False
    header: bool = False

    def config(self) -> Any:
        """The config of the body, as transformers knows it."""
        sizes = {k: v for k, v in {**SIZES, **BODIES[self.body]}.items() if v is not None}
        vocab_size = max(vocabulary(self).values()) + 5
        return transformers.AutoConfig.for_model(
            self.body, vocab_size=vocab_size, pad_token_id=1, bos_token_id=0, eos_token_id=2, **sizes
        )

    def make(self, folder: Path, seed: int = 0) -> Path:
        """Write the replica to `folder`, with its tokenizer."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) * (0.5 if len(shape) > 1 else 1.0)

        folder.mkdir(parents=True, exist_ok=True)
        config = self.config()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            body = transformers.AutoModel.from_config(config)
            for parameter in body.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
        state = {f"{self.prefix}{name}": tensor for name, tensor in body.state_dict().items()}
        if self.unembedding:
            state["lm_head.weight"] = draw(config.vocab_size, config.hidden_size)
        head = self.tensors(draw)
        if self.passed:
            save_file(head, folder / "passed_head.safetensors", {"format": "pt"})
        elif self.separate:
            save_file(head, folder / self.separate, {"format": "pt"})
        else:
            state |= head
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
        fields = {**config.to_dict(), "architectures": None, **self.fields}
        (folder / "config.json").write_text(json.dumps(fields, default=str))
        make_tokenizer(self).save_pretrained(folder)
        return folder

    def open_options(self, folder: Path) -> dict[str, Any]:
        """How `RewardHead.from_pretrained` opens the replica in `folder`."""
        if self.head is not None:
            return {**self.options, "head": self.head(load_file(folder / "model.safetensors"))}
        return {**self.options, **({"head": folder / "passed_head.safetensors"} if self.passed else {})}


def vocabulary(replica: Replica) -> dict[str, int]:
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, **{word: number for number, word in enumerate(WORDS, 3)}}
    words |= {"Yes": 40, "No": 41, "NL": 271}
    return words | (HEADERS[replica.body] if replica.header else {})


def make_tokenizer(replica: Replica) -> Any:
    raw = Tokenizer(models.WordLevel(vocabulary(replica), unk_token="<s>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<s>"
    )


def make_pairs(replica: Replica, n: int = 6) -> PreferencePairs:
    """Pairs of ragged lengths; with a header, every second prompt has two of them."""
    draw = torch.Generator().manual_seed(0)

    def words() -> str:
        length = int(torch.randint(1, 9, (), generator=draw))
        return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (length,), generator=draw))

    rows = []
    for number in range(n):
        prompt = words()
        if replica.header:
            header = HEADER[replica.body]
            prompt = f"{prompt} {header} {words()} {words()} {header}" if number % 2 else f"{prompt} {header}"
        rows.append({"prompt": prompt, "chosen": f" {words()} w1", "rejected": f" {words()} w2"})
    return PreferencePairs.from_records(rows)


class Reference:
    """The model of a folder in plain transformers and torch: one text at a time, without this library."""

    def __init__(self, replica: Replica, folder: Path, dtype: torch.dtype, *, head_from: Path | None = None) -> None:
        self.replica = replica
        self.fields = json.loads((folder / "config.json").read_text())
        state = {}
        for path in folder.glob("model*.safetensors"):
            state |= load_file(path)
        config = replica.config()
        for key in ("mlp_bias", "attention_bias"):
            if self.fields.get(key):
                setattr(config, key, True)
        self.body = transformers.AutoModel.from_config(config)
        inside = {name for name in state if not replica.prefix or name.startswith(replica.prefix)}
        self.body.load_state_dict({name.removeprefix(replica.prefix): state[name] for name in inside})
        self.body = self.body.to(dtype).eval()
        head = {name: state[name] for name in state if name not in inside}
        file = "passed_head.safetensors" if replica.passed else replica.separate
        if file:
            head |= load_file((head_from or folder) / file)
        self.head = {name: tensor.to(dtype) for name, tensor in head.items()}
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def projections(self) -> list[torch.nn.Module]:
        """The module of every layer whose input is the site mlp."""
        if self.replica.body == "gpt_neox":
            return [layer.mlp.dense_4h_to_h for layer in self.body.layers]
        return [layer.mlp.down_proj for layer in self.body.layers]

    def outputs(self, text: str) -> torch.Tensor:
        """All outputs for one text."""
        ids = self.tokenizer(text)["input_ids"]
        states = self.body(input_ids=torch.tensor([ids])).last_hidden_state[0]
        return self.replica.forward(states, ids, self.head, self.fields).flatten()

    def reward(self, text: str) -> torch.Tensor:
        """The output that is the reward, or the difference of two."""
        outputs = self.outputs(text)
        first, *second = self.replica.chosen
        return outputs[first] - outputs[second[0]] if second else outputs[first]

    @torch.no_grad()
    def rewards(self, texts: list[str]) -> torch.Tensor:
        return torch.stack([self.reward(text) for text in texts])

    def contributions(self, text: str) -> torch.Tensor:
        """The sum over tokens of activation times gradient of the reward, [layer, neuron], by autograd."""
        kept: list[torch.Tensor] = []

        def keep(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            kept.append(inputs[0].detach().requires_grad_() if not inputs[0].requires_grad else inputs[0])
            return (kept[-1], *inputs[1:])

        handles = [module.register_forward_pre_hook(keep) for module in self.projections()]
        try:
            gradients = torch.autograd.grad(self.reward(text), kept)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack([(a * g).sum(dim=(0, 1)) for a, g in zip(kept, gradients, strict=True)]).detach()

    def rewards_without(self, texts: list[str], mask: torch.Tensor) -> torch.Tensor:
        """The rewards with the neurons of `mask` [layer, neuron] set to zero, by plain hooks."""
        handles = [
            module.register_forward_pre_hook(lambda _, inputs, row=row: (inputs[0].masked_fill(row, 0.0), *inputs[1:]))
            for module, row in zip(self.projections(), mask, strict=True)
        ]
        try:
            return self.rewards(texts)
        finally:
            for handle in handles:
                handle.remove()
