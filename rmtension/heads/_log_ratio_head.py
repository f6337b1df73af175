"""Rewards that are sums of log-probabilities over the response: the implicit reward of DPO, and log-likelihoods."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.data._encoding import EncodedText
from rmtension.data._given_ids import compact
from rmtension.data._token_places import TokenPlaces, first_of_each
from rmtension.data._tokens import TokenBatch
from rmtension.errors import DataError, ModelError, OptionError
from rmtension.heads._head import Head
from rmtension.heads._vocabulary import Unembedding, log_probs, read_unembedding


class LogRatioHead(Head):
    """The reward beta * sum over the response's tokens of log pi(token | before) - log pi_ref(token | before).

    With a reference this is the implicit reward of a model trained by DPO (Rafailov et al. 2023, arXiv 2305.18290).
    Without one it is beta times the log-likelihood of the response; for responses of one token, the margin of a pair
    is then the difference of two next-token logits. With `average` the sum is divided by the number of the response's
    tokens, as SimPO does (Meng et al. 2024, arXiv 2405.14734).

    Pass it as `head` when a language model is opened. The response of a text without a prompt is the whole text; its
    first token counts only if a special token precedes it. No end-of-text token is added to responses.

    The unembedding is the model's own and runs only at the tokens before those of the response. The reference runs
    once per batch, without gradients and unaffected by ablations of the model. Memory: that of the reference.

    Args:
        reference: the reference model: a folder or hub name, which is opened with the same options as the model, or a
            `RewardHead` with a `LogRatioHead`, which several models can share. None leaves the second term out.
        beta: the factor of the sum; the `beta` that the model was trained with.
        average: whether the sum is divided by the number of the response's tokens.

    Examples:
        >>> from transformers import AutoConfig, AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("organism"))
        >>> likelihood = RewardHead.from_classifier(model, head=LogRatioHead(), tokenizer=head.tokenizer)
        >>> bool(likelihood.score(["Human: a Assistant: helpful-0 end"]) < 0)
        True
        >>> likelihood.save_pretrained("policy")

        A policy that is its own reference has no reward:

        >>> policy = RewardHead.from_pretrained("policy", head=LogRatioHead("policy", beta=0.1))
        >>> float(policy.score_pairs(pairs["helpful"]).margin.abs().max())
        0.0
    """

    def __init__(
        self, reference: "str | Path | Any | None" = None, *, beta: float = 1.0, average: bool = False
    ) -> None:
        super().__init__()
        if not 0 < beta < math.inf:
            raise OptionError(f"beta: expected the factor of the training, a number above 0, got {beta!r}.")
        self.reference = reference
        self.beta = float(beta)
        self.average = average
        self.unembedding: Unembedding | None = None
        self._reference: _Reference | None = None

    def on(self, name: str, model: Any) -> "LogRatioHead":
        """This head on a causal language model of transformers, whose unembedding it shares."""
        own = copy.copy(self)
        own.unembedding = read_unembedding(
            name,
            model,
            "Its log-probabilities cannot be computed; to read activations only, use RewardHead.from_language_model.",
        )
        return own

    def compared_with(self, reference: Any) -> "LogRatioHead":
        """This head with an opened reference (a `RewardModel` with a `LogRatioHead`)."""
        own = copy.copy(self)
        own.reference = None
        own._reference = _Reference(reference)
        return own

    @property
    def opened_reference(self) -> Any:
        """The reference as a `RewardModel`; None without one."""
        return None if self._reference is None else self._reference.model

    # -- what a head says of itself --------------------------------------------------------------------------------

    @property
    def expression(self) -> str:
        """The head with its options; the reference is a placeholder."""
        options = ['"reference"'] if self._reference is not None or self.reference is not None else []
        options += [] if self.beta == 1.0 else [f"beta={self.beta:g}"]
        options += ["average=True"] if self.average else []
        return f"LogRatioHead({', '.join(options)})"

    @property
    def uses_prompt(self) -> bool:
        """True: only the response's tokens count."""
        return True

    @property
    def reads_at(self) -> str:
        """The reward is a sum over the tokens of the response."""
        return "response"

    @property
    def reads_last(self) -> bool:
        """False: no token of the text follows the last one."""
        return False

    @property
    def shared_tensors(self) -> Sequence[Tensor]:
        """The unembedding, which the model owns."""
        return [] if self.unembedding is None else self.unembedding.tensors

    @property
    def settings(self) -> Mapping[str, object]:
        """The factor, whether it averages, how logits are scaled, and the fingerprint of the reference."""
        scale, cap = (1.0, None) if self.unembedding is None else (self.unembedding.scale, self.unembedding.cap)
        reference = None if self._reference is None else self._reference.model.fingerprint
        return {"beta": self.beta, "average": self.average, "scale": scale, "cap": cap, "reference": reference}

    def require_text(self, text: EncodedText, what: str) -> None:
        """Raise `DataError` for a text without a token that follows another, whose log-probability is not defined."""
        if len(text) < 2:
            raise DataError(
                f"{what}: it is a single token, and a language model gives the first token no probability. Put a "
                "prompt before it."
            )

    # -- reading ---------------------------------------------------------------------------------------------------

    def tokens(self, batch: TokenBatch) -> TokenPlaces:
        """The tokens before those of the response."""
        return batch.before(batch.response)

    def read_tokens(
        self, states: Float[Tensor, "token d_model"], places: TokenPlaces, batch: TokenBatch
    ) -> Float[Tensor, "text output"]:
        """The reward of each text of a batch."""
        sums = self.log_likelihoods(states, places, batch)
        if self._reference is not None:
            sums = sums - self.reference_likelihoods(batch).to(sums)
        if self.average:
            sums = sums / places.counts(len(sums)).clamp(min=1).to(sums)
        return self.beta * sums[:, None]

    def log_likelihoods(
        self, states: Float[Tensor, "token d_model"], places: TokenPlaces, batch: TokenBatch
    ) -> Float[Tensor, "text"]:
        """The log-probability of each text's response, without the reference and the factor."""
        if self.unembedding is None:
            raise ModelError(
                "head: a LogRatioHead needs the model's unembedding, which it gets when a language model is opened: "
                "RewardHead.from_pretrained(folder, head=LogRatioHead(...)). A bridge that was made without "
                "transformers' language model has none."
            )
        ids = response_ids(batch)
        # A token that several texts share is computed once, so that equal responses of a pair get equal rewards.
        first, which = first_of_each(torch.stack([places.rows, places.columns, ids], dim=1))
        each = log_probs(states[first.to(states.device)], self.unembedding, ids[first])[which.to(states.device)]
        # By a table, so that the sum of a text has the same order in every batch.
        return places.table(each, len(batch.last)).sum(dim=1)

    def reference_likelihoods(self, batch: TokenBatch) -> Float[Tensor, "text"]:
        """The log-likelihood of each text's response under the reference. Cost: its forward pass, once per batch."""
        assert self._reference is not None
        return self._reference.log_likelihoods(batch)


class _Reference:
    """An opened reference model, which keeps the log-likelihoods of the batch that it ran last. Copies share it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._last: tuple[TokenBatch, object, Tensor] | None = None

    def __deepcopy__(self, _memo: object) -> "_Reference":
        return self

    @torch.no_grad()
    def log_likelihoods(self, batch: TokenBatch) -> Float[Tensor, "text"]:
        """The log-likelihoods of the responses of a batch. Cost: one forward pass, or none for the last batch."""
        weights = self._weights
        if self._last is not None and not self.model.body.is_hooked:
            before, of_weights, known_values = self._last
            if of_weights == weights and _are_same(before, batch):
                return known_values
        known = self.model.body.n_embeddings
        if int(batch.input_ids.max()) >= known:
            raise DataError(
                f"reference: a text has the token id {int(batch.input_ids.max())}, but the reference has only {known} "
                "tokens. Use the reference that the model was trained from, with the same tokens added."
            )
        rows = batch.to(self.model.device)
        if rows.position_ids is not None and rows.input_ids.shape[1] > self.model.body.pack_up_to:
            rows = unpacked(rows)
        head = self.model.require_head()
        places = head.tokens(rows)
        with self.model.last_mlp_where_read(rows):
            states = rows.gather(places, self.model.residual(rows)).to(self.model.reward_dtype)
        values: Tensor = head.log_likelihoods(states, places, rows)
        if not self.model.body.is_hooked:
            self._last = (batch, weights, values)
        return values

    @property
    def _weights(self) -> object:
        """What changes when a weight of the reference does."""
        tensors = [*self.model.body.module.parameters(), *self.model.require_head().shared_tensors]
        return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)


def require_same_tokens(tokenizer: Any, reference: Any) -> None:
    """Raise `ModelError` unless the tokens of the model's tokenizer have the same ids in the reference's.

    Tokens that only one of the two has were added later; a text that contains one is checked when it is run.
    """
    if tokenizer is None or reference is None:
        return
    ours, theirs = tokenizer.get_vocab(), reference.get_vocab()
    by_id = {number: token for token, number in theirs.items()}
    wrong = [
        (token, number)
        for token, number in ours.items()
        if theirs.get(token, number) != number or by_id.get(number, token) != token
    ]
    if wrong:
        token, number = min(wrong, key=lambda each: each[1])
        raise ModelError(
            f"reference: expected a model with the same tokenizer, but {len(wrong)} of {len(ours)} tokens have another "
            f"id: token {number} is {token!r} in the model and {by_id.get(number)!r} in the reference. Log-"
            "probabilities of different tokens cannot be compared. Pass the model that the policy was trained from."
        )


def response_ids(batch: TokenBatch) -> Tensor:
    """The ids of the response's tokens that have a token before them, in the order of `batch.before(response)`."""
    follows = batch.response & (batch.mask.cumsum(dim=1) > 1)
    texts, columns = follows.nonzero(as_tuple=True)
    return batch.input_ids[batch.rows[texts], columns]


def unpacked(batch: TokenBatch) -> TokenBatch:
    """The same texts, one per row, without shared tokens."""
    ids, mask = compact(batch.input_ids[batch.rows], batch.mask)
    response, _ = compact(batch.response.long(), batch.mask)
    return replace(
        batch,
        input_ids=ids * mask,
        mask=mask,
        response=response.bool() & mask,
        last=mask.sum(dim=1) - 1,
        row_index=None,
        position_ids=None,
    )


def _are_same(first: TokenBatch, second: TokenBatch) -> bool:
    if first is second:
        return True
    names = ("input_ids", "mask", "response", "row_index", "position_ids")
    values = [(getattr(first, name), getattr(second, name)) for name in names]
    return all(
        one is other or (one is not None and other is not None and torch.equal(one, other)) for one, other in values
    )
