"""The paper's study on a base and pairs of your own, from training to report, by one recipe."""

from rmtension.replication._faithful import Faithful
from rmtension.replication._recipe import Recipe, read_recipe
from rmtension.replication._replicate import Replication, plan_replication, replicate

__all__ = ["Faithful", "Recipe", "Replication", "plan_replication", "read_recipe", "replicate"]
