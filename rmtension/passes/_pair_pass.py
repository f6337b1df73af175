"""One pass of a model over preference pairs for any statistic: in batches, resumable, divided over processes."""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sized
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Generic

from torch import Tensor

from rmtension._progress import progress_bar
from rmtension.data._encoding import EncodedPairs
from rmtension.data._packing import pair_batches
from rmtension.data._pair import PreferencePair
from rmtension.data._pairs import PreferencePairs
from rmtension.data._tokens import TokenBatch
from rmtension.distributed import current
from rmtension.errors import ModelError, OptionError, RMTensionWarning, StorageError
from rmtension.models._reward_model import RewardModel
from rmtension.passes._ahead import made_ahead, mapped_ahead, works_ahead
from rmtension.passes._nonfinite import are_finite, where_not_finite
from rmtension.passes._pair_statistic import PairStatistic, Result_co
from rmtension.passes._pass_record import PassRecord
from rmtension.store._work_folder import Progress, claim, locked

# How many pairs are in memory at a time, as tokens: enough for batches of texts of similar length.
_PAIRS_PER_CHUNK = 512
# A row of several pairs may have this many tokens per unit of the model's width: in longer rows, attention costs what
# sharing the prompt saves.
_WIDTHS = 3
_GROUP_AT_LEAST = 256
# How many batches are made ahead of the one that runs.
_N_AHEAD = 2


def run_pass(
    head: RewardModel,
    pairs: Iterable[PreferencePair],
    statistic: PairStatistic[Result_co],
    *,
    work: str | Path | None = None,
    progress: bool | None = None,
) -> Result_co:
    """Run a model over both texts of every pair, accumulate a statistic, and return what it computes.

    `pairs` is any iterable, which may be larger than memory: it is read once, 512 pairs at a time. Inside
    `distributed.sharded` every process runs some of the batches, and all processes get the result of all pairs. A pair
    that produces NaN or infinity raises `ModelError` with its id and the layer, or is skipped and counted if the model
    was opened with `on_nonfinite="skip"`.

    Args:
        head: the reward model.
        pairs: preference pairs.
        statistic: what to observe, to accumulate and to compute.
        work: a folder in which the progress is saved every half minute. After an interruption, the same call resumes
            from there and returns the same numbers. Raises `StorageError` for the folder of another run, and
            `OptionError` if the model has hooks.
        progress: True shows a progress bar, False hides it; None shows it in a terminal or notebook, if the run takes
            longer than two seconds.

    Cost: that of `statistic.observe` per batch.

    Examples:
        >>> import torch
        >>> from rmtension.passes import PairStatistic
        >>> class TokensPerPair(PairStatistic[float]):
        ...     name = "tokens"  # the label of the progress bar
        ...     def __init__(self):
        ...         self.n_tokens = torch.zeros((), dtype=torch.long)
        ...     @property
        ...     def state(self):  # what a work folder saves
        ...         return {"n_tokens": self.n_tokens}
        ...     def observe(self, batch):  # may run the model, changes nothing
        ...         return [batch.select("all").sum()]
        ...     def update(self, batch, observed):  # changes the state, in place
        ...         self.n_tokens += observed[0].cpu()
        ...     def compute(self, record):
        ...         return float(self.n_tokens / record.n_pairs)
        >>> run_pass(head, pairs["helpful"], TokensPerPair())
        64.0
    """
    return _Pass(head, pairs, statistic, None if work is None else Path(work), progress).run()


@dataclass(frozen=True)
class _Chunk:
    """Pairs that are in memory together, as tokens; `start` is the number of the first pair."""

    start: int
    pairs: PreferencePairs
    encoded: EncodedPairs

    def only(self, number: int) -> "_Chunk":
        """A chunk of the pair with this number only."""
        row = number - self.start
        chosen, rejected = (side[row : row + 1] for side in (self.encoded.chosen, self.encoded.rejected))
        return _Chunk(number, self.pairs[row : row + 1], replace(self.encoded, chosen=chosen, rejected=rejected))


class _Pass(Generic[Result_co]):
    """The state of one `run_pass`."""

    def __init__(
        self,
        model: RewardModel,
        pairs: Iterable[PreferencePair],
        statistic: PairStatistic[Result_co],
        work: Path | None,
        progress: bool | None,
    ) -> None:
        self._model = model
        self._pairs = pairs
        self._statistic = statistic
        self._work = work
        self._progress = progress
        self._shard = current()
        self._order = hashlib.sha256()
        self._record = PassRecord(model.tokens_together(keeps_layers=statistic.keeps_layers))

    def run(self) -> Result_co:
        is_divided = self._shard.size > 1
        if is_divided:
            self._shard.require_same("model", self._model.fingerprint)
        with ExitStack() as stack:
            saved = None
            if self._work is not None:
                self._require_unhooked()
                stack.enter_context(locked(self._work))
                # An iterator's pairs are not known yet; they are compared as they are read.
                claim(self._work, self._settings(), optional=("pairs",))
                saved = Progress(self._work, self._statistic.state)
                if saved.place:
                    self._record = PassRecord.read(self._work, saved.place)
            if is_divided:
                # Free memory decides the size, and the folder of a process keeps that of its first attempt.
                what = "size of batches (a process that was interrupted keeps its own: begin in an empty work folder)"
                self._shard.require_same(what, str(self._record.tokens_per_batch))
            self._run_batches(saved)
        if is_divided:
            self._record.merge_skipped(self._shard.texts)
        self._warn_of_skipped()
        if is_divided:
            self._shard.require_same("list of pairs", self._order.hexdigest())
            self._statistic.merge_processes(self._shard.add_up)
        return self._statistic.compute(self._record)

    def _run_batches(self, saved: Progress | None) -> None:
        record = self._record
        total = len(self._pairs) if isinstance(self._pairs, Sized) else None
        with progress_bar(progress=self._progress, total=total, desc=self._statistic.name, unit="pair") as bar:
            number = record.batches_before
            for chunk in self._chunks(bar):
                record.chunk_start, record.batches_before = chunk.start, number
                for number, batch, observed in self._observed(chunk, bar):
                    if observed is not None:
                        self._update(chunk, batch, observed)
                    bar.update(batch.n_pairs)
                    record.batches_done = number
                    if saved is not None and saved.is_due:
                        saved.save(record.to_dict())
                number = record.batches_done
            if saved is not None and not record.is_finished:
                record.is_finished, record.chunk_start = True, record.n_read
                saved.save(record.to_dict())

    def _chunks(self, bar: Any) -> Iterator[_Chunk]:
        """Read the pairs chunk by chunk; chunks that were done before an interruption are read and skipped."""
        record = self._record
        resumed_at, n_known, n_read = record.chunk_start, record.n_read, 0
        for pairs, encoded in self._encoded(resumed_at):
            start, n_read = n_read, n_read + len(pairs)
            if self._work is not None or self._shard.size > 1:
                self._order.update(pairs.ordered_digest.encode())
            order = self._order.hexdigest()
            is_last_known = start < n_known <= n_read
            # The chunk to resume is the last known one. If it ends earlier, no batch of it may run: its sums would be
            # saved with those of other pairs.
            ends_early = start == resumed_at and n_read < n_known
            if ends_early or (is_last_known and (n_read, order) != (n_known, record.order)):
                raise self._other_pairs()
            if record.is_finished and start >= n_known:
                raise self._other_pairs()
            if encoded is None:
                bar.update(len(pairs))
                continue
            if start >= n_known:
                record.add_chunk(pairs, encoded, order)
            yield _Chunk(start, pairs, encoded)
        if n_read < n_known:
            raise self._other_pairs()

    def _encoded(self, resumed_at: int) -> Iterator[tuple[PreferencePairs, EncodedPairs | None]]:
        """The pairs of every chunk, with their tokens unless it ends before the pair with the number `resumed_at`."""

        def read() -> Iterator[tuple[int, PreferencePairs]]:
            rest, n_read = iter(self._pairs), 0
            while len(pairs := PreferencePairs(islice(rest, _PAIRS_PER_CHUNK), first=n_read)):
                yield n_read, pairs
                n_read += len(pairs)

        def encode(chunk: tuple[int, PreferencePairs]) -> tuple[PreferencePairs, EncodedPairs | None]:
            start, pairs = chunk
            return pairs, None if start < resumed_at else self._model.encode(pairs)

        return mapped_ahead(encode, read(), 1) if works_ahead(self._model.device) else map(encode, read())

    def _observed(self, chunk: _Chunk, bar: Any) -> Iterator[tuple[int, TokenBatch, list[Tensor] | None]]:
        """For every batch of a chunk that is not done: its number, the batch, and what the statistic observed.

        What was observed is None if another process runs the batch. On a GPU, a batch is yielded after the next one was
        started, so that the GPU is busy while this process waits for results and prepares another batch.
        """
        waiting = None
        for number, batch in enumerate(self._batches(chunk), start=self._record.batches_before + 1):
            if number <= self._record.batches_done:
                bar.update(batch.n_pairs)
                continue
            observed = None
            if self._shard.takes(number - 1):
                observed = self._statistic.observe(self._model.after_prompts(batch))
            started = number, batch, observed
            if self._model.device.type == "cpu":
                yield started
                continue
            if waiting is not None:
                yield waiting
            waiting = started
        if waiting is not None:
            yield waiting

    def _batches(self, chunk: _Chunk) -> Iterator[TokenBatch]:
        model, sharing = self._model, self._statistic.sharing
        if sharing == "after prompt" and not model.runs_prompts_first:
            sharing = "pair"
        # Batches for a GPU are made in pinned memory, from which it copies them while it runs earlier batches.
        is_ahead = works_ahead(model.device)
        batches = pair_batches(
            chunk.encoded,
            tokens_per_batch=self._record.tokens_per_batch,
            read_at=model.read_at,
            device="cpu" if is_ahead else model.device,
            pack_up_to=model.body.pack_up_to,
            group_up_to=max(_GROUP_AT_LEAST, _WIDTHS * model.d_model),
            sharing=sharing,
            # A process that runs some of the batches would run the prompts of all.
            prompts_together=self._shard.size == 1,
        )
        numbered = (replace(batch, indices=tuple(chunk.start + index for index in batch.indices)) for batch in batches)
        if not is_ahead:
            return numbered
        return (batch.to(model.device) for batch in made_ahead((batch.pinned() for batch in numbered), _N_AHEAD))

    def _update(self, chunk: _Chunk, batch: TokenBatch, observed: list[Tensor]) -> None:
        if are_finite(observed):
            self._statistic.update(batch, observed)
            return
        # One pair's NaN makes others of its row or batch NaN: run every pair by itself.
        for number in batch.indices[: batch.n_pairs]:
            only = chunk.only(number)
            (alone,) = self._batches(only)
            alone = self._model.after_prompts(alone)
            observed = self._statistic.observe(alone)
            if are_finite(observed):
                self._statistic.update(alone, observed)
                continue
            pair = only.pairs[0]
            if self._model.on_nonfinite == "raise":
                what = where_not_finite(self._model, alone, observed, self._statistic.layer_dim)
                raise ModelError(
                    f"pair {pair.id!r} (number {number}): {what}. To skip and count such pairs, open the model with "
                    'on_nonfinite="skip".'
                )
            self._record.skip(number, pair, only.encoded)

    def _warn_of_skipped(self) -> None:
        skipped = list(self._record.skipped.values())
        if skipped and self._shard.is_first:
            first = ", ".join(map(repr, skipped[:3]))
            warnings.warn(
                f"{len(skipped)} of {self._record.n_read} pairs produced NaN or infinite values and were skipped: "
                f"{first}{', ...' if len(skipped) > 3 else ''}. The result's provenance has all their ids.",
                RMTensionWarning,
                stacklevel=5,
            )

    def _settings(self) -> dict[str, Any]:
        """Everything that the run's numbers depend on, as far as it is known before the pairs are read."""
        model, pairs = self._model, self._pairs
        given = {"pairs": pairs.ordered_digest} if isinstance(pairs, PreferencePairs) else {}
        return {
            "statistic": type(self._statistic).__name__.lstrip("_"),
            **self._statistic.settings,
            **given,
            "model": model.fingerprint,
            "tokenizer and config": model.setup_digest,
            "tokens_per_batch": model.tokens_per_batch,
            "truncate_response": model.truncate_response,
            "on_nonfinite": model.on_nonfinite,
            "sharing": self._statistic.sharing,
            "processes": self._shard.size,
            "versions": {name: version(name) for name in ("rmtension", "torch", "transformers")},
        }

    def _require_unhooked(self) -> None:
        if self._model.body.is_hooked:
            raise OptionError(
                "work: the model has hooks, and a work folder cannot record what hooks do. Leave the AblationContext "
                "or remove your hooks first, or score ablations with score_without(..., work=...)."
            )

    def _other_pairs(self) -> StorageError:
        return StorageError(
            f"{self._work}: this folder belongs to a run over other pairs, or over these in another order. Use a new "
            "folder, or delete this one."
        )
