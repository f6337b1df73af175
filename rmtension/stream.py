"""Preference pairs on their way through a model: read, encoded and batched some at a time, counted, and resumed."""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from jaxtyping import Float
from torch import Tensor

from rmtension.distributed import current
from rmtension.encoding import EncodedPairs, encode_pairs
from rmtension.errors import DataError, ModelError, OptionError, RMTensionWarning, StorageError
from rmtension.header import read_record
from rmtension.nonfinite import are_finite, where_not_finite
from rmtension.packing import Sharing, pair_batches
from rmtension.pair import PreferencePair
from rmtension.pairs import PreferencePairs
from rmtension.progress import progress_bar
from rmtension.provenance import Provenance
from rmtension.reward_model import RewardModel
from rmtension.scored import ScoredPairs
from rmtension.tokens import TokenBatch
from rmtension.work import Progress, claim, locked

# Pairs that are in memory at a time, as tokens: enough for batches of texts of similar length.
_AT_A_TIME = 512
# A row of several pairs may have so many times the model's width of tokens: longer, attention over the row costs what
# sharing the prompt saves.
_WIDTHS = 3
_GROUP_AT_LEAST = 256


_Found = TypeVar("_Found", bound=Sequence[Tensor])


@dataclass
class _Place:
    """Where a run is, and what it has read; JSON in a work folder.

    Batches are numbered over all pairs: `before` came before the part that begins with pair `first`, `done` are done.
    """

    tokens_per_batch: int
    first: int = 0
    before: int = 0
    done: int = 0
    is_finished: bool = False
    # Digest of all pairs up to the end of that part, in their order.
    order: str = ""
    n_read: int = 0
    n_tokens: int = 0
    n_prompts_cut: int = 0
    n_responses_cut: int = 0
    digest: int = 0
    # Number, id, digest and tokens of every pair that was left out.
    skipped: list[tuple[int, str, str, int]] = field(default_factory=list)


def _read_place(work: Path, values: Mapping[str, Any]) -> _Place:
    """What a work folder has; raises `StorageError` where it was changed by hand."""
    skipped, kinds = values.get("skipped"), [int, str, str, int]
    try:
        if not isinstance(skipped, list) or not all(isinstance(one, list) for one in skipped):
            raise StorageError(f"{work}: damaged: expected a list of pairs that were left out, found {skipped!r:.80}.")
        if not all(list(map(type, one)) == kinds for one in skipped):
            raise StorageError(f"{work}: damaged: expected pairs that were left out, found {skipped!r:.80}.")
        # JSON has no tuples.
        return read_record(work, _Place, {**values, "skipped": [tuple(one) for one in skipped]})
    except StorageError as error:
        raise StorageError(
            f"{work}: what is kept there was changed since ({error}). Remove the folder to begin again."
        ) from error


@dataclass(frozen=True)
class _Part:
    """Pairs that are in memory together, as tokens; `first` is the number of the first."""

    first: int
    pairs: PreferencePairs
    encoded: EncodedPairs

    def only(self, place: int) -> "_Part":
        """The pair of that number alone."""
        row = place - self.first
        chosen, rejected = (side[row : row + 1] for side in (self.encoded.chosen, self.encoded.rejected))
        return _Part(place, self.pairs[row : row + 1], replace(self.encoded, chosen=chosen, rejected=rejected))


class PairStream:
    """A run over both texts of every pair of an iterable, batch by batch, and what has been read of them so far.

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
        on_nonfinite: "raise", or "skip": what happens to a pair that gives numbers which are none.
        work: a folder that keeps what was done, every half minute: after an interruption, the same call goes on there.
        inputs: name -> value of what the run depends on beside model, pairs and the above; compared in `work`.
    """

    def __init__(
        self,
        head: RewardModel,
        pairs: Iterable[PreferencePair],
        *,
        desc: str = "",
        progress: bool = False,
        sharing: Sharing = "prompt",
        truncate_response: bool = False,
        keeps_layers: bool = False,
        on_nonfinite: str = "raise",
        work: str | Path | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        if on_nonfinite not in ("raise", "skip"):
            raise OptionError(f"on_nonfinite: expected 'raise' or 'skip', got {on_nonfinite!r}.")
        self.head = head
        self._pairs = pairs
        self._desc = desc
        self._progress = progress
        self._sharing = sharing
        self._truncate_response = truncate_response
        self._keeps_layers = keeps_layers
        self._on_nonfinite = on_nonfinite
        self._work = None if work is None else Path(work)
        self._inputs = dict(inputs or {})
        self._at = _Place(0)
        self._order = hashlib.sha256()
        self._shard = current()

    def run(
        self,
        look: Callable[[TokenBatch], _Found],
        add: Callable[[TokenBatch, _Found], None],
        state: Mapping[str, Tensor],
        *,
        layer_dim: int | None = None,
    ) -> None:
        """Over every batch, `add(batch, look(batch))`, where all that `look` gives is numbers.

        `add` changes nothing but `state`, in place: with a work folder, that is what is kept there, and what a resumed
        run starts from. Along `layer_dim` of every tensor that `look` gives lie layers; None where there are none.

        Raises `ModelError` where a pair gives numbers that are none, naming the pair and the layer; with
        `on_nonfinite="skip"` it is left out and counted. Raises `StorageError` for a work folder of another run.
        """
        if not self.is_whole:
            self._shard.require_same("model", self.head.fingerprint)
        self._at = _Place(self.head.tokens_together(keeps_layers=self._keeps_layers))
        with ExitStack() as stack:
            kept = None
            if self._work is not None:
                self._require_unhooked()
                stack.enter_context(locked(self._work))
                claim(self._work, self._depends_on())
                kept = Progress(self._work, state)
                if kept.place:
                    self._at = _read_place(self._work, kept.place)
            self._run(look, add, kept, layer_dim)
        if not self.is_whole:
            found = self._shard.texts(json.dumps(self._at.skipped))
            self._at.skipped = [tuple(one) for text in found for one in json.loads(text)]
        self._warn()

    @property
    def is_whole(self) -> bool:
        """Whether this process has all batches."""
        return self._shard.size == 1

    @property
    def n_pairs(self) -> int:
        """Pairs that were read and not left out."""
        return self._at.n_read - len(self._at.skipped)

    @property
    def n_tokens(self) -> int:
        """Tokens of their texts."""
        return self._at.n_tokens - sum(n_tokens for *_, n_tokens in self._at.skipped)

    @property
    def n_cut(self) -> tuple[int, int]:
        """How many of all pairs that were read lost prompt tokens, and how many response tokens."""
        return self._at.n_prompts_cut, self._at.n_responses_cut

    @property
    def skipped(self) -> dict[int, str]:
        """Number -> id of every pair that was left out."""
        return {number: name for number, name, *_ in sorted(self._at.skipped)}

    @property
    def digest(self) -> str:
        """That of `PreferencePairs` over all pairs that were read and not left out."""
        left_out = sum(int(digest, 16) for _, _, digest, _ in self._at.skipped)
        return f"{(self._at.digest - left_out) % 2**256:064x}"

    def require_pairs(self) -> None:
        """Raise `DataError` if there was none."""
        if not self.n_pairs:
            n = len(self._at.skipped)
            raise DataError(
                f"pairs: expected at least one preference pair, got {f'{n} without finite numbers' if n else 'none'}."
            )

    def add_up(self, *tensors: Tensor) -> None:
        """Each tensor, on the CPU, becomes its sum over the processes that share the batches, in place."""
        if not self.is_whole:
            self._shard.require_same("list of pairs", self._order.hexdigest())
            self._shard.add_up(*tensors)

    def provenance(self, n_tokens: int, *, site: str, positions: str, method: str) -> Provenance:
        """What a result from `n_tokens` tokens of the pairs read so far has to carry."""
        found = self.head.provenance(self.digest, self.n_pairs, n_tokens, site=site, positions=positions, method=method)
        return replace(found, skipped=tuple(self.skipped.values()))

    def kept(self, n: int) -> list[int]:
        """The numbers of the first `n` pairs without those that were left out."""
        left_out = self.skipped
        return [number for number in range(n) if number not in left_out]

    def scored(self, pairs: PreferencePairs, rewards: Float[Tensor, "2 pair"]) -> ScoredPairs:
        """The rewards that this run over `pairs` has found, chosen and rejected, without the pairs it left out."""
        kept = self.kept(len(pairs))
        some = PreferencePairs(pairs[number] for number in kept) if self.skipped else pairs
        provenance = self.provenance(self.n_tokens, site="residual", positions="last", method="reward")
        return ScoredPairs(rewards[0, kept], rewards[1, kept], some, provenance, *self.n_cut)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _run(
        self,
        look: Callable[[TokenBatch], _Found],
        add: Callable[[TokenBatch, _Found], None],
        kept: Progress | None,
        layer_dim: int | None,
    ) -> None:
        at = self._at
        total = len(self._pairs) if isinstance(self._pairs, Sized) else None
        with progress_bar(progress=self._progress, total=total, desc=self._desc, unit="pair") as bar:
            number = at.before
            for part in self._parts(bar):
                at.first, at.before = part.first, number
                for number, batch, found in self._looked_at(part, look, bar):
                    if found is not None:
                        self._add(part, batch, found, look, add, layer_dim)
                    bar.update(batch.n_pairs)
                    at.done = number
                    if kept is not None and kept.is_due:
                        kept.save(asdict(at))
                number = at.done
            if kept is not None and not at.is_finished:
                at.is_finished, at.first = True, at.n_read
                kept.save(asdict(at))

    def _parts(self, bar: Any) -> Iterator[_Part]:
        """Some pairs at a time; those that were done before an interruption are read, and left out."""
        at, begun_at, n_known, n_read = self._at, self._at.first, self._at.n_read, 0
        rest = iter(self._pairs)
        while len(pairs := PreferencePairs(islice(rest, _AT_A_TIME), first=n_read)):
            first, n_read = n_read, n_read + len(pairs)
            if self._work is not None or not self.is_whole:
                self._order.update(pairs.ordered_digest.encode())
            order = self._order.hexdigest()
            is_last_known = first < n_known <= n_read
            if (is_last_known and (n_read, order) != (n_known, at.order)) or (at.is_finished and first >= n_known):
                raise self._other_pairs()
            if first < begun_at:
                bar.update(len(pairs))
                continue
            encoded = encode_pairs(
                self.head.tokenizer, pairs, max_length=self.head.max_length, truncate_response=self._truncate_response
            )
            if first >= n_known:
                at.n_read, at.order = n_read, order
                at.n_tokens += encoded.n_tokens
                at.n_prompts_cut += encoded.n_prompts_cut
                at.n_responses_cut += encoded.n_responses_cut
                at.digest += int(pairs.digest, 16)
            yield _Part(first, pairs, encoded)
        if n_read < n_known:
            raise self._other_pairs()

    def _looked_at(
        self, part: _Part, look: Callable[[TokenBatch], _Found], bar: Any
    ) -> Iterator[tuple[int, TokenBatch, _Found | None]]:
        """The number of every batch of a part that is not done, the batch, and what `look` gives of it.

        None where another process has it. A batch on a GPU comes once the next one was begun there, so that the GPU has
        work while this process waits for what it gave and makes another batch.
        """
        waiting = None
        for number, batch in enumerate(self._batches(part), start=self._at.before + 1):
            if number <= self._at.done:
                bar.update(batch.n_pairs)
                continue
            begun = number, batch, look(batch) if self._shard.takes(number - 1) else None
            if self.head.device.type == "cpu":
                yield begun
                continue
            if waiting is not None:
                yield waiting
            waiting = begun
        if waiting is not None:
            yield waiting

    def _batches(self, part: _Part) -> Iterator[TokenBatch]:
        head = self.head
        batches = pair_batches(
            part.encoded,
            tokens_per_batch=self._at.tokens_per_batch,
            pad_token_id=head.pad_token_id,
            device=head.device,
            pack_up_to=head.body.pack_up_to,
            group_up_to=max(_GROUP_AT_LEAST, _WIDTHS * head.d_model),
            sharing=self._sharing,
        )
        return (replace(batch, places=tuple(part.first + place for place in batch.places)) for batch in batches)

    def _add(
        self,
        part: _Part,
        batch: TokenBatch,
        found: _Found,
        look: Callable[[TokenBatch], _Found],
        add: Callable[[TokenBatch, _Found], None],
        layer_dim: int | None,
    ) -> None:
        if are_finite(found):
            add(batch, found)
            return
        # What is no number makes others so that are in its row or batch: every pair has to stand for itself.
        for place in batch.places[: batch.n_pairs]:
            one = part.only(place)
            (alone,) = self._batches(one)
            found = look(alone)
            if are_finite(found):
                add(alone, found)
                continue
            pair = one.pairs[0]
            if self._on_nonfinite == "raise":
                what = where_not_finite(self.head, alone, found, layer_dim)
                raise ModelError(
                    f"pair {pair.id!r} (number {place}): {what}. Or leave such pairs out, and count them: "
                    'on_nonfinite="skip".'
                )
            self._at.skipped.append((place, pair.id, pair.digest(), one.encoded.n_tokens))

    def _warn(self) -> None:
        n = len(self._at.skipped)
        if n and self._shard.is_first:
            some = ", ".join(repr(name) for name in list(self.skipped.values())[:3])
            warnings.warn(
                f"{n} of {self._at.n_read} pairs gave numbers that are not finite and are left out: {some}"
                f"{', ...' if n > 3 else ''}. The result's provenance has all their ids.",
                RMTensionWarning,
                stacklevel=4,
            )

    def _depends_on(self) -> dict[str, Any]:
        """Everything that the run's numbers depend on, as far as it can be known before the pairs are read."""
        head, pairs = self.head, self._pairs
        given = {"pairs": pairs.ordered_digest} if isinstance(pairs, PreferencePairs) else {}
        return {
            **self._inputs,
            **given,
            "model": head.fingerprint,
            "tokenizer and config": head.setup_digest,
            "tokens_per_batch": head.tokens_per_batch,
            "truncate_response": self._truncate_response,
            "on_nonfinite": self._on_nonfinite,
            "sharing": self._sharing,
            "processes": self._shard.size,
            "versions": {name: version(name) for name in ("rmtension", "torch", "transformers")},
        }

    def _require_unhooked(self) -> None:
        if self.head.body.is_hooked:
            raise OptionError(
                "work: the model has hooks, of yours or of an ablation that is entered, and a folder cannot know what "
                "these do. Leave the context first; sweep.score_without scores ablations with a work folder."
            )

    def _other_pairs(self) -> StorageError:
        return StorageError(
            f"{self._work}: its work was begun with other pairs, or with these in another order. Name another folder."
        )
