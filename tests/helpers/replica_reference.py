"""A replica in plain transformers and torch: one text at a time, without this library."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import transformers
from replicas import Replica, Text
from safetensors.torch import load_file
from torch.nn import functional

# Body -> where its blocks are, and in a block the module whose input is the site mlp.
_NEURONS = {
    "gpt_neox": ("layers", "mlp.dense_4h_to_h"),
    "deberta-v2": ("encoder.layer", "output.dense"),
    "bert": ("encoder.layer", "output.dense"),
    "modernbert": ("layers", "mlp.Wo"),
    "qwen2_5_vl": ("language_model.layers", "mlp.down_proj"),
}
# (layer, neurons of one text [1, token, neuron]) -> the neurons that the layer goes on with.
Change = Callable[[int, torch.Tensor], torch.Tensor]
# A prompt and a response.
Parts = tuple[str, str]


class Reference:
    """The model in a folder. `head_from` is the folder of the files that were not saved again."""

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
        self.body = replica.make_body(config)
        inside = {name for name in state if name.startswith(replica.prefix) and ".pooler." not in name}
        inside -= {"lm_head.weight"}
        stored = {name.removeprefix(replica.prefix): state[name] for name in inside}
        self.body.load_state_dict(replica.layout(stored, False))
        self.body = self.body.to(dtype).eval()
        if replica.site == "expert":
            self.body.set_experts_implementation("eager")  # the other ways have no float64
        head = {name: state[name] for name in state if name not in inside}
        first = head_from or folder
        file = "passed_head.safetensors" if replica.passed else replica.separate
        if file:
            head |= load_file(first / file)
        self.head = {name: tensor.to(dtype) for name, tensor in head.items()}
        self.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        self.minus = None if replica.minus is None else Reference(replica.minus, first / "reference", dtype)

    def text(self, parts: Parts) -> Text:
        """The tokens of a prompt with its response."""
        prompt, response = parts
        if self.replica.segments:
            encoded = self.tokenizer(prompt, response, return_token_type_ids=True)
            types = encoded["token_type_ids"]
            return Text(encoded["input_ids"], 0, types if any(types) else None)
        if self.replica.template is not None:
            prompt, response = f"<user> {prompt} </s> ", f"<assistant> {response} </s> <cls>"
        return Text(self.tokenizer(f"{prompt} {response}")["input_ids"], len(self.tokenizer(prompt)["input_ids"]))

    def outputs(self, parts: Parts) -> torch.Tensor:
        """All outputs for one text."""
        text = self.text(parts)
        types = {} if text.types is None else {"token_type_ids": torch.tensor([text.types])}
        states = self.body(input_ids=torch.tensor([text.ids]), **types).last_hidden_state[0]
        outputs = self.replica.forward(states, text, self.head, self.fields).flatten()
        return outputs if self.minus is None else outputs - self.minus.outputs(parts).detach()

    def reward(self, parts: Parts) -> torch.Tensor:
        """The output that is the reward, or the difference of two."""
        outputs = self.outputs(parts)
        first, *second = self.replica.chosen
        return outputs[first] - outputs[second[0]] if second else outputs[first]

    @torch.no_grad()
    def rewards(self, texts: list[Parts]) -> torch.Tensor:
        return torch.stack([self.reward(parts) for parts in texts])

    def contributions(self, parts: Parts) -> torch.Tensor:
        """The sum over tokens of activation times gradient of the reward, [layer, neuron], by autograd."""
        kept: list[torch.Tensor] = []

        def keep(_layer: int, neurons: torch.Tensor) -> torch.Tensor:
            kept.append(neurons if neurons.requires_grad else neurons.detach().requires_grad_())
            return kept[-1]

        with self._changed(keep):
            gradients = torch.autograd.grad(self.reward(parts), kept)
        return torch.stack([(a * g).sum(dim=(0, 1)) for a, g in zip(kept, gradients, strict=True)]).detach()

    def rewards_without(self, texts: list[Parts], mask: torch.Tensor) -> torch.Tensor:
        """The rewards with the neurons of `mask` [layer, neuron] set to zero, by plain hooks."""
        with self._changed(lambda layer, neurons: neurons.masked_fill(mask[layer], 0.0)):
            return self.rewards(texts)

    @contextmanager
    def _changed(self, change: Change) -> Iterator[None]:
        """Let every layer go on with changed neurons."""
        blocks, projection = _NEURONS.get(self.replica.body, ("layers", "mlp.down_proj"))
        layers: Any = self.body.get_submodule(blocks)
        if self.replica.site == "expert":
            for number, layer in enumerate(layers):
                layer.mlp.experts.forward = MethodType(_dense(number, change), layer.mlp.experts)
            try:
                yield
            finally:
                for layer in layers:
                    del layer.mlp.experts.forward
            return
        handles = [
            layer.get_submodule(projection).register_forward_pre_hook(
                lambda _, inputs, number=number: (change(number, inputs[0]), *inputs[1:])
            )
            for number, layer in enumerate(layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _dense(layer: int, change: Change) -> Callable[..., torch.Tensor]:
    """The forward of experts in which every expert computes every token; a neuron is 0 where its expert is not used."""

    def forward(experts: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        shares = hidden.new_zeros(len(hidden), experts.num_experts).scatter(1, index, weights.to(hidden))
        used = torch.zeros_like(shares).scatter(1, index, 1.0)
        gate, up = torch.einsum("td,eid->tei", hidden, experts.gate_up_proj).chunk(2, dim=2)
        neurons = functional.silu(gate) * up * used[..., None]
        neurons = change(layer, neurons.flatten(1)[None])[0].view(neurons.shape)
        return torch.einsum("tei,edi,te->td", neurons, experts.down_proj, shares)

    return forward
