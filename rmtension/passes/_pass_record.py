"""Which pairs a pass has read: counts, digests, the pairs that were skipped, and the position to resume from."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rmtension._sites import check_positions
from rmtension.data._encoding import EncodedPairs
from rmtension.data._pair import PreferencePair
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import DataError, StorageError
from rmtension.models._reward_model import RewardModel
from rmtension.store._provenance import Provenance
from rmtension.store._records import read_record


@dataclass
class PassRecord:
    """The pairs that a pass has read so far, and the position to resume from; saved as JSON in a work folder.

    Batches are numbered over all pairs. The pairs are read in chunks: `chunk_start` is the number of the first pair of
    the current chunk, `batches_before` is the number of batches before the chunk, `batches_done` the number of batches
    that are done.
    """

    tokens_per_batch: int
    chunk_start: int = 0
    batches_before: int = 0
    batches_done: int = 0
    is_finished: bool = False
    # Digest of all pairs up to the end of the current chunk, in their order.
    order: str = ""
    n_read: int = 0
    # Tokens of both texts: all of them, and those of the responses.
    n_all_tokens: int = 0
    n_response_tokens: int = 0
    n_prompts_cut: int = 0
    n_responses_cut: int = 0
    sum_of_digests: int = 0
    # Number, id, digest, tokens and response tokens of every skipped pair.
    skipped_pairs: list[tuple[int, str, str, int, int]] = field(default_factory=list)

    @property
    def n_pairs(self) -> int:
        """How many pairs were read and not skipped."""
        return self.n_read - len(self.skipped_pairs)

    @property
    def skipped(self) -> dict[int, str]:
        """Number -> id of every skipped pair."""
        return {number: name for number, name, *_ in sorted(self.skipped_pairs)}

    @property
    def digest(self) -> str:
        """The digest of the pairs that were read and not skipped, computed as that of `PreferencePairs`."""
        skipped = sum(int(digest, 16) for _, _, digest, *_ in self.skipped_pairs)
        return f"{(self.sum_of_digests - skipped) % 2**256:064x}"

    def n_tokens(self, positions: str) -> int:
        """How many tokens `positions` selects, over both texts of the pairs that were read and not skipped."""
        check_positions(positions)
        if positions == "all":
            return self.n_all_tokens - sum(n_all for *_, n_all, _ in self.skipped_pairs)
        if positions == "response":
            return self.n_response_tokens - sum(n_response for *_, n_response in self.skipped_pairs)
        return 2 * self.n_pairs

    def kept(self, n: int) -> list[int]:
        """The numbers of the first `n` pairs without the skipped ones."""
        skipped = self.skipped
        return [number for number in range(n) if number not in skipped]

    def require_pairs(self) -> None:
        """Raise `DataError` unless some pair was read and not skipped."""
        if not self.n_pairs:
            n = len(self.skipped_pairs)
            got = f"{n} with NaN or infinite values, which were skipped" if n else "none"
            raise DataError(f"pairs: expected at least one preference pair, got {got}.")

    def provenance(self, model: RewardModel, *, site: str, positions: str, method: str) -> Provenance:
        """The provenance of a result that `model` computed from these pairs."""
        n_tokens = self.n_tokens(positions)
        provenance = model.provenance(
            self.digest, self.n_pairs, n_tokens, site=site, positions=positions, method=method
        )
        return replace(provenance, skipped=tuple(self.skipped.values()))

    # -- updated by the pass ---------------------------------------------------------------------------------------

    def add_chunk(self, pairs: PreferencePairs, encoded: EncodedPairs, order: str) -> None:
        """Count the pairs of a chunk; `order` is the digest of all pairs up to its end."""
        self.n_read += len(pairs)
        self.order = order
        self.n_all_tokens += encoded.n_tokens
        self.n_response_tokens += encoded.n_response_tokens
        self.n_prompts_cut += encoded.n_prompts_cut
        self.n_responses_cut += encoded.n_responses_cut
        self.sum_of_digests += int(pairs.digest, 16)

    def skip(self, number: int, pair: PreferencePair, encoded: EncodedPairs) -> None:
        """Record a pair as skipped; `encoded` holds its two texts."""
        self.skipped_pairs.append((number, pair.id, pair.digest(), encoded.n_tokens, encoded.n_response_tokens))

    def merge_skipped(self, texts_of_processes: Callable[[str], list[str]]) -> None:
        """Collect the pairs that any of several processes skipped."""
        texts = texts_of_processes(json.dumps(self.skipped_pairs))
        self.skipped_pairs = [tuple(pair) for text in texts for pair in json.loads(text)]

    def to_dict(self) -> dict[str, Any]:
        """A plain dict, for JSON."""
        return asdict(self)

    @classmethod
    def read(cls, work: Path, values: Mapping[str, Any]) -> "PassRecord":
        """Read a record from a work folder; raises `StorageError` if it was edited by hand."""
        skipped, kinds = values.get("skipped_pairs"), [int, str, str, int, int]
        try:
            if not isinstance(skipped, list) or not all(isinstance(pair, list) for pair in skipped):
                raise StorageError(f"{work}: damaged: expected a list of skipped pairs, got {skipped!r:.80}.")
            if not all(list(map(type, pair)) == kinds for pair in skipped):
                raise StorageError(
                    f"{work}: damaged: expected the number, id, digest and token counts of every skipped pair, got "
                    f"{skipped!r:.80}."
                )
            # JSON has no tuples.
            return read_record(work, cls, {**values, "skipped_pairs": [tuple(pair) for pair in skipped]})
        except StorageError as error:
            raise StorageError(
                f"{work}: the progress in this folder was edited after it was saved ({error}). Remove the folder to "
                "begin again."
            ) from error
