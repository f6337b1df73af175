"""Results on disk with their provenance, and work folders of long runs; files are written completely or not at all."""

from rmtension.store._provenance import Provenance

__all__ = ["Provenance"]
