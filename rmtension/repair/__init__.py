"""Repair: mend a weak objective of a reward model by the least edit, without harm to a strong one, and measure both."""

from rmtension.repair._diagnose import Diagnosis, diagnose
from rmtension.repair._edit import Edit
from rmtension.repair._receipt import RepairReport
from rmtension.repair._repair import Repair, repair
from rmtension.repair._splits import RepairPairs
from rmtension.repair._train_only_neurons import TrainOnlyNeurons

__all__ = ["Diagnosis", "Edit", "Repair", "RepairPairs", "RepairReport", "TrainOnlyNeurons", "diagnose", "repair"]
