"""Synthetic pairs and models with known answers, made offline."""

from rmtension.synthetic._damage import DamagedModel, plant_damage
from rmtension.synthetic._organisms import Organism, make_organism, make_two_output_organism
from rmtension.synthetic._world import PreferenceWorld, preference_world

__all__ = [
    "DamagedModel",
    "Organism",
    "PreferenceWorld",
    "make_organism",
    "make_two_output_organism",
    "plant_damage",
    "preference_world",
]
