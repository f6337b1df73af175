"""Files that appear whole or not at all: results with their provenance, and work folders of long runs."""

from rmtension.store._provenance import Provenance

__all__ = ["Provenance"]
