"""Preference pairs on their way through a model: read, encoded and batched some at a time, and counted."""

import hashlib
from collections.abc import Iterable, Iterator, Sized
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from torch import Tensor
from tqdm.auto import tqdm

from rmtension.distributed import current
from rmtension.encoding import EncodedPairs, encode_pairs
from rmtension.errors import DataError
from rmtension.packing import Sharing, pair_batches
from rmtension.pair import PreferencePair
from rmtension.pairs import PreferencePairs
from rmtension.provenance import Provenance
from rmtension.tokens import TokenBatch

if TYPE_CHECKING:
    from rmtension.reward_head import RewardHead

# Pairs that are in memory at a time, as tokens: enough for batches of texts of similar length.
_AT_A_TIME = 512
# A row of several pairs may have so many times the model's width of tokens: longer, attention over the row costs what
# sharing the prompt saves.
_WIDTHS = 3
_GROUP_AT_LEAST = 256


class PairStream:
    """Batches with both texts of every pair of an iterable, and what has been read of them so far.

    `pairs` is read once, `_AT_A_TIME` pairs at a time, so that it may be longer than memory. `places` of batches count
    from its first pair. Inside `distributed.sharded` every process gets some of the batches, and `add_up` puts
    together what they made of them; what is counted here is of all.

    Args:
        head: the model that the batches are for.
        pairs: preference pairs.
        desc: what the progress bar says.
        progress: whether there is one.
        sharing: whose texts may share a row (`rmtension.packing`).
        truncate_response: whether responses that do not fit are cut.
        keeps_layers: whether something of every layer is kept of a batch, which then has to be smaller.
    """

    def __init__(
        self,
        head: "RewardHead",
        pairs: Iterable[PreferencePair],
        *,
        desc: str = "",
        progress: bool = False,
        sharing: Sharing = "prompt",
        truncate_response: bool = False,
        keeps_layers: bool = False,
    ) -> None:
        self.head = head
        self.n_pairs = self.n_tokens = self.n_prompts_cut = self.n_responses_cut = 0
        self._pairs = pairs
        self._desc = desc
        self._progress = progress
        self._sharing = sharing
        self._truncate_response = truncate_response
        self._keeps_layers = keeps_layers
        self._digest = 0
        self._order = hashlib.sha256()
        self._shard = current()

    def __iter__(self) -> Iterator[TokenBatch]:
        total = len(self._pairs) if isinstance(self._pairs, Sized) else None
        silent = None if self._progress and self._shard.is_first else True
        if not self.is_whole:
            self._shard.require_same("model", self.head.fingerprint)
        number = 0
        tokens_per_batch = self.head.tokens_together(keeps_layers=self._keeps_layers)
        with tqdm(total=total, desc=self._desc, unit="pair", disable=silent) as bar:
            for first, encoded in self._parts():
                for batch in self._batches(encoded, tokens_per_batch):
                    if self._shard.takes(number):
                        yield replace(batch, places=tuple(first + place for place in batch.places))
                    number += 1
                    bar.update(batch.n_pairs)

    @property
    def is_whole(self) -> bool:
        """Whether this process has all batches."""
        return self._shard.size == 1

    @property
    def digest(self) -> str:
        """That of `PreferencePairs` over all pairs read so far."""
        return f"{self._digest % 2**256:064x}"

    def require_pairs(self) -> None:
        """Raise `DataError` if there was none."""
        if not self.n_pairs:
            raise DataError("pairs: expected at least one preference pair, got none.")

    def add_up(self, *tensors: Tensor) -> None:
        """Each tensor, on the CPU, becomes its sum over the processes that share the batches, in place."""
        if not self.is_whole:
            self._shard.require_same("list of pairs", self._order.hexdigest())
            self._shard.add_up(*tensors)

    def provenance(self, n_tokens: int, *, site: str, positions: str, method: str) -> Provenance:
        """What a result from `n_tokens` tokens of the pairs read so far has to carry."""
        return self.head.provenance(self.digest, self.n_pairs, n_tokens, site=site, positions=positions, method=method)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _parts(self) -> Iterator[tuple[int, EncodedPairs]]:
        """Some pairs at a time, as tokens, with the number of the first; counts them."""
        head, rest = self.head, iter(self._pairs)
        while len(pairs := PreferencePairs(islice(rest, _AT_A_TIME), first=self.n_pairs)):
            first = self.n_pairs
            encoded = encode_pairs(
                head.tokenizer, pairs, max_length=head.max_length, truncate_response=self._truncate_response
            )
            self.n_pairs += len(pairs)
            self.n_tokens += encoded.n_tokens
            self.n_prompts_cut += encoded.n_prompts_cut
            self.n_responses_cut += encoded.n_responses_cut
            self._digest += int(pairs.digest, 16)
            if not self.is_whole:
                self._order.update(pairs.ordered_digest.encode())
            yield first, encoded

    def _batches(self, encoded: EncodedPairs, tokens_per_batch: int) -> Iterator[TokenBatch]:
        head = self.head
        return pair_batches(
            encoded,
            tokens_per_batch=tokens_per_batch,
            pad_token_id=head.pad_token_id,
            device=head.device,
            pack_up_to=head.body.pack_up_to,
            group_up_to=max(_GROUP_AT_LEAST, _WIDTHS * head.d_model),
            sharing=self._sharing,
        )
