"""Synthetic pairs and models with known answers, made offline."""

from rmtension.synthetic._organisms import Organism, make_organism, make_two_output_organism
from rmtension.synthetic._world import PreferenceWorld, preference_world

__all__ = ["Organism", "PreferenceWorld", "make_organism", "make_two_output_organism", "preference_world"]
