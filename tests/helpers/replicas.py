"""Tiny replicas of published reward models: a small body, the tensors and the config of one kind, and its formula.

`Replica.forward` is the kind's own forward pass after the body, in plain torch, for one text. To add a kind, add an
entry to a list of replicas and list it in `all_replicas`; `kind_checks` measures whatever it gets.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

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
D = SIZES["hidden_size"]
_ENCODER = {"num_key_value_heads": None}
_DISENTANGLED = {
    **_ENCODER,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "share_att_key": True,
    "position_biased_input": False,
    "type_vocab_size": 0,
    "norm_rel_ebd": "layer_norm",
}
_SEEN = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": D, "patch_size": 4}
# What a config needs besides the sizes, or instead of them; None leaves a size out.
BODIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64},
    "gpt_neox": {"num_key_value_heads": None},
    "helium": {"head_dim": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None, "intermediate_size": 24},
    "qwen2_5_vl": {
        "text_config": {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}},
        "vision_config": _SEEN | {"window_size": 16, "fullatt_block_indexes": [0]},
        "image_token_id": 272,
        "video_token_id": 273,
        "vision_start_token_id": 274,
        "vision_end_token_id": 275,
    },
    "bert": _ENCODER,
    "modernbert": {**_ENCODER, "local_attention": 8, "cls_token_id": 0, "sep_token_id": 2},
    "deberta-v2": _DISENTANGLED,
    "t5": {"d_model": D, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4},
}
ENCODERS = ("bert", "modernbert", "deberta-v2")
CLASSIFIER = {"architectures": ["LlamaForSequenceClassification"]}
CODE = {
    "auto_map": {
        "AutoConfig": "modeling_custom.Config",
        "AutoModel": "modeling_custom.Model",
        "AutoModelForSequenceClassification": "modeling_custom.Model",
    }
}
Draw = Callable[..., torch.Tensor]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Text:
    """The token ids of one text, the index of its first response token, and its token types, if it has two segments."""

    ids: list[int]
    first: int
    types: list[int] | None = None


@dataclass(frozen=True)
class Replica:
    """One kind of reward model.

    Attributes:
        kind: its name in tables.
        models: published models of this kind.
        forward: (last hidden states [token, d_model] after the final norm, text, tensors, config) -> all outputs.
        tensors: makes the head's tensors, by their published names.
        body: the model type of the body.
        fields: what the published config.json has besides the body's fields, and instead of them.
        prefix: what the names of the body's tensors begin with.
        options: how it is opened.
        chosen: the output that is the reward, or two for a difference.
        separate: the file that the head is stored in; None for the model's own file.
        passed: whether the head's tensors are passed as head=, in a file, and not stored with the body.
        head: makes what is passed as head= from the replica's folder.
        minus: the model whose outputs are subtracted, in the folder "reference": the reference of DPO.
        site: the site whose neurons are compared.
        unembedding: whether the checkpoint has an unembedding of its own.
        reopened: how it is opened after it was saved; by default as before.
        as_classifier: whether it is saved as a classifier of transformers.
        layout: the body's tensors as they are stored (True), or as transformers names them (False).
        header: whether texts have the header of an assistant turn, so that the vocabulary has its ids.
        marker: the token that ends each step of a response.
        one_token: whether a response is a single token.
        segments: whether prompt and response are the two segments of an encoder.
        template: the chat template, if texts are chats.
    """

    kind: str
    models: str
    forward: Callable[[torch.Tensor, Text, Tensors, dict[str, Any]], torch.Tensor]
    tensors: Callable[[Draw], Tensors]
    body: str = "llama"
    fields: dict[str, Any] = field(default_factory=dict)
    prefix: str = "model."
    options: dict[str, Any] = field(default_factory=dict)
    chosen: tuple[int, ...] = (0,)
    separate: str | None = None
    passed: bool = False
    head: Callable[[Path], Any] | None = None
    minus: "Replica | None" = None
    site: str = "mlp"
    unembedding: bool = False
    reopened: dict[str, Any] | None = None
    as_classifier: bool = False
    header: bool = False
    marker: str | None = None
    one_token: bool = False
    segments: bool = False
    template: str | None = None
    layout: Callable[[Tensors, bool], Tensors] = lambda body, stored: body

    def config(self) -> Any:
        """The config of the body, as transformers knows it."""
        vocab_size = max(vocabulary(self).values()) + 5
        sizes = {**SIZES, "vocab_size": vocab_size, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
        own = BODIES[self.body]
        sizes = {**own, "text_config": {**sizes, **own["text_config"]}} if "text_config" in own else {**sizes, **own}
        sizes = {k: v for k, v in sizes.items() if v is not None}
        return transformers.AutoConfig.for_model(self.body, **sizes)

    def make_body(self, config: Any) -> Any:
        """The base model of transformers; without a pooler, which is a part of the head."""
        more = {"add_pooling_layer": False} if self.body == "bert" else {}
        return transformers.AutoModel.from_config(config, **more)

    def make(self, folder: Path, seed: int = 0) -> Path:
        """Write the replica to `folder`, with its tokenizer."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) * (0.5 if len(shape) > 1 else 1.0)

        folder.mkdir(parents=True, exist_ok=True)
        config = self.config()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            body = self.make_body(config)
            for parameter in body.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
        stored = self.layout(dict(body.state_dict()), True)
        state = {f"{self.prefix}{name}": tensor for name, tensor in stored.items()}
        if self.unembedding:
            state["lm_head.weight"] = draw(config.get_text_config().vocab_size, D)
        head = self.tensors(draw)
        if self.passed:
            save_file(head, folder / "passed_head.safetensors", {"format": "pt"})
        elif self.separate:
            save_file(head, folder / self.separate, {"format": "pt"})
        else:
            state |= head
        save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
        fields = {**config.to_dict(), "architectures": None, **self.fields}
        (folder / "config.json").write_text(json.dumps(fields, default=str))
        make_tokenizer(self).save_pretrained(folder)
        if self.minus is not None:
            self.minus.make(folder / "reference", seed + 1)
        return folder

    def open_options(self, folder: Path) -> dict[str, Any]:
        """How `RewardHead.from_pretrained` opens the replica in `folder`."""
        options = dict(self.options)
        if self.fields.get("model_type", self.body) == "qwen2":
            options["tokenizer"] = make_tokenizer(self)  # transformers expects the vocabulary of Qwen in the files
        if self.head is not None:
            options["head"] = self.head(folder)
        elif self.passed:
            options["head"] = folder / "passed_head.safetensors"
        return options


def linear(name: str, bias: bool = True) -> Any:
    """The formula of a linear head on the last state."""

    def forward(states, text, tensors, config):
        value = tensors[f"{name}.weight"] @ states[-1]
        return value + tensors[f"{name}.bias"] if bias else value

    return forward


def row(name: str, rows: int = 1, bias: bool = True) -> Any:
    """The tensors of a linear head."""

    def make(draw):
        return {f"{name}.weight": draw(rows, D)} | ({f"{name}.bias": draw(rows)} if bias else {})

    return make


def vocabulary(replica: Replica) -> dict[str, int]:
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, **{word: number for number, word in enumerate(WORDS, 3)}}
    words |= {"Yes": 40, "No": 41, "<extra_0>": 42, "<cls>": 43, "<user>": 44, "<assistant>": 45, "NL": 271}
    return words | (HEADERS[replica.body] if replica.header else {})


def make_tokenizer(replica: Replica) -> Any:
    raw = Tokenizer(models.WordLevel(vocabulary(replica), unk_token="<s>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<s>"}
    if replica.body in ENCODERS:
        special |= {"cls_token": "<s>", "sep_token": "</s>"}
        second = 1 if replica.body == "bert" else 0
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            pair=f"<s> $A </s> $B:{second} </s>:{second}",
            special_tokens=[("<s>", 0), ("</s>", 2)],
        )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    tokenizer.chat_template = replica.template
    return tokenizer


def make_pairs(replica: Replica, n: int = 6) -> PreferencePairs:
    """Pairs of ragged lengths; with a header, every second prompt has two of them."""
    draw = torch.Generator().manual_seed(0)

    def words() -> str:
        length = int(torch.randint(1, 9, (), generator=draw))
        return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (length,), generator=draw))

    def response(number: int, last: str) -> str:
        if replica.one_token:
            return WORDS[number + (6 if last == "w1" else 12)]
        if replica.marker is None:
            return f" {words()} {last}"
        steps = [words() for _ in range(1 + number % 3)]
        return " ".join(["", *(f"{step} {replica.marker}" for step in steps), last, replica.marker])

    rows = []
    for number in range(n):
        prompt = words()
        if replica.header:
            header = HEADER[replica.body]
            prompt = f"{prompt} {header} {words()} {words()} {header}" if number % 2 else f"{prompt} {header}"
        rows.append({"prompt": prompt, "chosen": response(number, "w1"), "rejected": response(number, "w2")})
    return PreferencePairs.from_records(rows)
