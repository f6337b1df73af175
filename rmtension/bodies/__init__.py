"""Transformers as they run: their blocks, norms and projections, and hooks on their neurons."""

__all__: list[str] = []
