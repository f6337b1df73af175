"""`RewardHead.check`: the guarantees of this library, checked on the user's own model.

| check | what it compares | what it does not show |
|---|---|---|
| tokens | ids with the tokenizer's own; BOS at most once | that the model was trained with this tokenizer |
| equal to transformers | rewards with the checkpoint, read again by transformers, one text at a time | other texts |
| bridge | rewards through the TransformerBridge with transformers' modules | hooks inside attention |
| batch equals single | rewards in one batch with rewards alone | other batch sizes |
| padding | rewards with 0 to 40 pad tokens on either side with rewards without | more padding |
| last token | that another last token changes what is read | that it is the token you want to read |
| hooks, per site | that each layer's hook fires once and changes no earlier layer | what the activation means |
| zeroing, per site | the stream that is read, with the site set to 0 and without | single neurons |
| direct contributions | their sum with the reward | indirect effects |
| layers | what neurons and biases write with what each layer adds to the residual stream | the same |
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.bodies._hooks import HookSite, InstalledHooks
from rmtension.bodies._native_run import let_run_in_float64, type_inputs
from rmtension.bodies._run_modes import eager_eval
from rmtension.data._encoding import EncodedText
from rmtension.data._pairs import PreferencePairs
from rmtension.data._tokens import TokenBatch
from rmtension.errors import CheckError, ModelError, OptionError
from rmtension.heads._head import Head, LinearHead
from rmtension.heads._outputs import pick
from rmtension.heads._weighted_sum import with_weighted_sum
from rmtension.models._checkpoint import Source
from rmtension.models._checkpoints import open_checkpoint
from rmtension.models._classifiers import reload_classifier
from rmtension.models._direct_path import direct_contributions, written_by
from rmtension.models._reward_model import RewardModel
from rmtension.passes._probes import Probe, find_probes
from rmtension.passes._scoring import score_tokens
from rmtension.passes._token_rewards import rewards_of_tokens

# How many tokens, spread over the vocabulary, are tried as another last token: some may have equal embeddings.
_LAST_TOKENS = 8


def check_head(head: RewardModel, pairs: PreferencePairs | None = None, reference: Any = None) -> pd.DataFrame:
    """Run every check that applies to `head`: one row per check, with check, n, value, limit, passed and note.

    The texts are those of the first 8 `pairs`, or 8 built-in texts; token ids are drawn at random if there is no
    tokenizer, or if its vocabulary fits none of the texts. `reference` is a transformers classifier to compare with; by
    default the checkpoint is loaded again, which takes its memory a second time during the check. Cost: about 30
    forward passes over 8 or 16 texts.

    Raises `CheckError` with the names of the checks that failed; its `table` attribute has the rows.
    """
    head.require_choice()
    checker = _Checker(head, find_probes(head, pairs))
    checker.run(reference)
    table = pd.DataFrame(checker.rows, columns=["check", "n", "value", "limit", "passed", "note"])
    failed = table.loc[~table["passed"]]
    if len(failed):
        described = "; ".join(
            f"{row.check}: {row.value:.2g}, limit {row.limit:.2g} ({row.note})" for row in failed.itertuples()
        )
        raise CheckError(f"check: {len(failed)} of {len(table)} failed: {described}", table)
    return table


class _Checker:
    """Runs the checks of one head; `rows` collects their results."""

    def __init__(self, head: RewardModel, probes: list[Probe]) -> None:
        self.head = head
        self.probes = probes
        self.texts = [probe.encoded for probe in probes]
        self.alone = torch.tensor([probe.reward for probe in probes], dtype=head.reward_dtype)
        self.rows: list[tuple[str, int, float, float, bool, str]] = []

    def run(self, reference: Any) -> None:
        checks: list[tuple[str, Callable[[], None]]] = [
            ("tokens", self._tokens),
            ("equal to transformers", partial(self._transformers, reference)),
            ("bridge", self._bridge),
            ("batch equals single", self._batched),
            ("padding", self._padding),
            ("last token", self._last_token),
            *((site, partial(self._site, site)) for site in self.head.sites),
            ("direct contributions", self._direct),
        ]
        for name, check in checks:
            try:
                check()
            except Exception as error:  # a check that cannot run has failed, and the other checks still run
                undefined = float("nan")
                self.rows.append((name, 0, undefined, undefined, False, f"{type(error).__name__}: {error}"))

    def _batched(self) -> None:
        self._compare("batch equals single", self._score(self.texts), half=5e-2)

    def _tokens(self) -> None:
        if self.head.tokenizer is None:
            return
        bos = self.head.tokenizer.bos_token_id
        wrong = sum(
            self._own_ids(probe) != probe.ids or (bos is not None and probe.ids[:2] == [bos, bos])
            for probe in self.probes
        )
        self._add("tokens", len(self.probes), wrong, 0, "texts with other ids than the tokenizer's, or BOS twice")

    def _transformers(self, reference: Any) -> None:
        checkpoint = self.head.checkpoint
        if reference is None and checkpoint is not None and checkpoint.source is None and self.head.body.native is None:
            return  # a converted model in memory, which was compared with the original when it was converted
        model: Any = reload_classifier(self.head) if reference is None else reference
        # Transformers' classifiers have no bias, so a bias of the head is added to their logits.
        constant = 0.0
        plain = None if checkpoint is None or checkpoint.head is None else self._with_sums(checkpoint.head)
        if isinstance(plain, LinearHead):
            constant = plain.row(self.head.require_choice())[1]
        adds_bias = getattr(getattr(model, "score", None), "bias", None) is not None
        if adds_bias or (checkpoint is not None and checkpoint.reads_tokens):
            constant = 0.0
        if model is not None:
            let_run_in_float64(model)
            texts = [self._own_text(probe) for probe in self.probes]
            expected = rewards_of_tokens(self.head, texts, model)
            expected = self._by_logits(model) + constant if expected is None else expected
        elif checkpoint is not None and checkpoint.source is not None:
            expected = self._by_hidden_state(checkpoint.source)
        else:
            return
        difference = float((expected - self.alone).abs().max())
        self._add("equal to transformers", len(expected), difference, self._limit(half=5e-2), "max |difference|")

    def _by_logits(self, model: Any) -> Float[Tensor, "text"]:
        """The rewards by transformers alone: its tokens, its pooling, its logits."""
        device = next(model.parameters()).device
        rewards = []
        with torch.no_grad(), eager_eval(model.modules()):
            for probe in self.probes:
                batch = self._batch([self._own_text(probe)], device)
                inputs = type_inputs(model, batch)
                logits = model(input_ids=batch.input_ids, use_cache=False, **inputs).logits[0].to(self.alone)
                # A language model has logits at every token, a classifier only at the token that it pools.
                logits = logits if logits.ndim == 1 else logits[-1]
                rewards.append(pick(logits, self._rows(logits.shape[-1])))
        return torch.stack(rewards)

    def _rows(self, n_logits: int) -> tuple[int, ...]:
        """The indices of the logits that the reward is computed from."""
        checkpoint = self.head.checkpoint
        rows = None if checkpoint is None else checkpoint.logit_rows
        if n_logits == 1:
            return (0,)
        if rows is None or max(rows) >= n_logits:
            raise OptionError(
                f"reference: expected a model with one output, or with the outputs that the head was opened with, got "
                f"{n_logits} outputs. Pass the classifier that the head was made from."
            )
        return rows

    def _by_hidden_state(self, source: Source) -> Float[Tensor, "text"]:
        """For a head that transformers cannot load: read the checkpoint again, and its head from the hidden states."""
        again = open_checkpoint(
            source.name, reward=True, head=source.head, output=source.output, options=source.options
        )
        base: Any = again.base
        let_run_in_float64(base)
        assert again.head is not None
        plain = copy.deepcopy(again.head).to(self.head.device, self.alone.dtype)
        plain = self._with_sums(plain)
        choice = self.head.require_choice()
        rewards = []
        for probe in self.probes:
            batch = self._batch([self._own_text(probe)])
            with torch.no_grad():
                stream = base(input_ids=batch.input_ids, use_cache=False, **type_inputs(base, batch))[0]
                places = plain.tokens(batch)
                outputs = plain.read_tokens(batch.gather(places, stream).to(self.alone), places, batch)[0].cpu()
            rewards.append(pick(outputs, choice))
        return torch.stack(rewards)

    def _with_sums(self, plain: Head) -> Head:
        """The head of a checkpoint with the weighted sums that were added to its outputs."""
        for weights in self.head.weighted_sums:
            plain, _ = with_weighted_sum(plain, weights)
        return plain

    def _bridge(self) -> None:
        if self.head.body.native in (None, self.head.model):
            return  # no bridge
        bridge: Any = self.head.model
        # With a hook that is not this library's, the bridge runs instead of transformers' modules.
        with bridge.hooks(fwd_hooks=[(next(iter(bridge.hook_dict)), lambda value, hook: value)]):
            rewards = self._score(self.texts)
        self._compare("bridge", rewards, half=5e-2)

    def _padding(self) -> None:
        if self.head.require_head().uses_prompt or any(text.has_types for text in self.texts):
            return  # padded rows of token ids do not say where the prompt ends
        worst = 0.0
        for left, right in ((0, 3), (40, 0), (7, 40)):
            width = max(map(len, self.texts)) + left + right
            ids = torch.full((len(self.texts), width), self.head.pad_token_id or 0)
            mask = torch.zeros_like(ids)
            for row, text in enumerate(self.texts):
                columns = slice(width - right - len(text), width - right) if left else slice(0, len(text))
                ids[row, columns], mask[row, columns] = torch.tensor(text.ids), 1
            worst = max(worst, float((score_tokens(self.head, ids, mask) - self.alone).abs().max()))
        self._add("padding", len(self.texts), worst, self._limit(half=5e-2), "max |difference|, either side")

    def _last_token(self) -> None:
        n_tokens = self.head.body.n_embeddings
        others = sorted({number * n_tokens // _LAST_TOKENS for number in range(_LAST_TOKENS)} | set(range(3)))
        if n_tokens < 3:
            return  # one of two tokens may be the pad token, and the other the text's last
        same = list(self.texts)
        for other in others:
            if not same:
                break
            tried = [text for text in same if other not in (self.head.pad_token_id, text.ids[-1])]
            if tried:
                changed = [replace(text, ids=(*text.ids[:-1], other)) for text in tried]
                # Compares the residual stream, because the head may give both tokens the same reward.
                equal = (self._read(changed) == self._read(tried)).all(dim=1).tolist()
                same = [text for text in same if text not in tried] + [
                    text for text, is_same in zip(tried, equal, strict=True) if is_same
                ]
        note = "texts whose residual stream, where it is read, was the same for every other last token that was tried"
        self._add("last token", len(self.texts), len(same), 0, note)

    def _site(self, site: str) -> None:
        seen: list[list[Tensor]] = [[] for _ in range(self.head.n_layers)]

        def keep(layer: int, activation: Tensor) -> None:
            seen[layer].append(activation)

        with self.head.hooks(site, keep):
            self._score(self.texts)
        # Two hooks on the same module would see the same tensor.
        distinct = {id(activations[0]) for activations in seen if len(activations) == 1}
        wrong = self.head.n_layers - len(distinct)
        before = self._streams()
        for layer in range(self.head.n_layers):
            # A hook that is really in an earlier layer changes the stream that this layer gets.
            with self.head.hooks(site, lambda _, activation: torch.zeros_like(activation), [layer]):
                wrong += not torch.equal(self._streams()[layer], before[layer])
        note = "layers whose hook did not fire exactly once, or changed an earlier layer"
        self._add(f"hooks, {site}", len(seen), wrong, 0, note)
        batch = self._batch(self.texts)
        active = torch.zeros(len(self.texts), dtype=torch.bool, device=self.head.device)

        def note_active(_layer: int, activation: Tensor) -> None:
            if activation.numel() % batch.input_ids.numel():
                active.fill_(True)
            else:
                values = activation.reshape(*batch.input_ids.shape, -1).ne(0).any(dim=2)
                active.logical_or_((values.to(active.device) & batch.mask).any(dim=1))

        with self.head.hooks(site, note_active):
            as_is = self._read(self.texts)
        with self.head.hooks(site, lambda layer, activation: torch.zeros_like(activation)):
            same = (self._read(self.texts) == as_is).all(dim=1)
        # In a small ReLU model, a text may activate no neuron.
        active = active.cpu()
        self._add(
            f"zeroing, {site}",
            int(active.sum()),
            int((same & active).sum()),
            0,
            "texts whose residual stream did not change",
        )

    def _direct(self) -> None:
        try:
            _ = self.head.body.final_norm
        except ModelError:
            return  # without a known final norm, the reward cannot be split
        parts = direct_contributions(self.head, self._batch(self.texts))
        self._compare("direct contributions", parts.reward, half=2e-1)
        if set(parts.neurons) == written_by(self.head):
            written = parts.biases + sum(part.sum(dim=2) for part in parts.neurons.values())
            worst = float((written - parts.blocks).abs().max())
            self._add("layers", parts.blocks.numel(), worst, self._limit(half=2e-1), "max |difference| in a layer")

    # -- inside ----------------------------------------------------------------------------------------------------

    def _streams(self) -> list[Tensor]:
        """The residual stream before every layer on the shortest probe."""
        kept: list[Tensor] = []
        blocks = map(self.head.body.block, range(self.head.n_layers))
        with InstalledHooks([(HookSite(block, "input"), kept.append) for block in blocks]):
            self._score([min(self.texts, key=len)])
        return kept

    def _read(self, texts: Sequence[EncodedText]) -> Float[Tensor, "text d_model"]:
        """The residual stream where the reward of each text is read."""
        batch = self._batch(texts)
        with torch.no_grad():
            return batch.gather_last(self.head.residual(batch)).cpu()

    def _own_ids(self, probe: Probe) -> list[int]:
        """The tokenizer's ids of the text; the head's for a chat, a text that is too long or that begins with BOS."""
        tokenizer = self.head.tokenizer
        if probe.text is None:
            return probe.ids
        parts = (probe.text,) if isinstance(probe.text, str) else probe.text
        if tokenizer.bos_token and parts[0].startswith(tokenizer.bos_token):
            return probe.ids
        own: list[int] = tokenizer(*parts, verbose=False)["input_ids"]
        return own if len(own) <= self.head.max_length else probe.ids

    def _own_text(self, probe: Probe) -> EncodedText:
        return replace(probe.encoded, ids=tuple(self._own_ids(probe)))

    def _batch(self, texts: Sequence[EncodedText], device: torch.device | None = None) -> TokenBatch:
        where = self.head.device if device is None else device
        return TokenBatch.from_texts(texts, range(len(texts)), read_at=self.head.read_at, device=where)

    def _score(self, texts: Sequence[EncodedText]) -> Float[Tensor, "text"]:
        with torch.no_grad():
            return self.head.forward(self._batch(texts)).cpu()

    def _limit(self, *, half: float) -> float:
        """1e-4 in float32, 1e-6 in float64 (some families keep norms in float32), relative to the largest reward."""
        limits = {torch.float64: 1e-6, torch.float32: 1e-4}
        return limits.get(self.head.dtype, half) * max(1.0, float(self.alone.abs().max()))

    def _compare(self, name: str, rewards: Tensor, *, half: float) -> None:
        difference = float((rewards - self.alone).abs().max())
        self._add(name, len(rewards), difference, self._limit(half=half), "max |difference|")

    def _add(self, name: str, n: int, value: float | int, limit: float | int, note: str) -> None:
        self.rows.append((name, n, float(value), float(limit), bool(value <= limit), note))
