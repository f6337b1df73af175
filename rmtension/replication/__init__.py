"""The paper's study on a base and pairs of your own, from training to report, by one recipe."""

from rmtension.replication._recipe import Recipe, read_recipe

__all__ = ["Recipe", "read_recipe"]
