"""Mend a reward model that is weak on one objective, by the least edit, and prove it on held-out pairs."""

__all__: list[str] = []
