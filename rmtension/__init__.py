"""Find which neurons of a reward model drive its judgments of helpfulness and harmlessness, and ablate them.

Open a model with `RewardHead`, score its neurons with `NeuronAttribution`, compare sets with `SharedNeuronAnalyzer`,
ablate them with `AblationContext`, or run the whole comparison with `TensionStudy`. Names are imported on first use, so
that `import rmtension` does not load torch or transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rmtension.attribution import NeuronAttribution
    from rmtension.data import PreferencePair, PreferencePairs
    from rmtension.errors import RMTensionError
    from rmtension.evaluation import PairRewards
    from rmtension.interventions import AblationContext, Mean, OtherResponse, Resample, Scale, Zero, ablation_effects
    from rmtension.neurons import NeuronScores, NeuronSet, SharedNeuronAnalyzer, SharedNeuronReport
    from rmtension.passes import ActivationCollector, ActivationSample, ActivationStatistics
    from rmtension.reward_head import RewardHead
    from rmtension.study import StudyOptions, StudyResult, TensionStudy, inspect_model

_MODULE_OF = {
    "AblationContext": "interventions",
    "ActivationCollector": "passes",
    "ActivationSample": "passes",
    "ActivationStatistics": "passes",
    "Mean": "interventions",
    "NeuronAttribution": "attribution",
    "NeuronScores": "neurons",
    "NeuronSet": "neurons",
    "OtherResponse": "interventions",
    "PairRewards": "evaluation",
    "PreferencePair": "data",
    "PreferencePairs": "data",
    "RMTensionError": "errors",
    "Resample": "interventions",
    "RewardHead": "reward_head",
    "Scale": "interventions",
    "SharedNeuronAnalyzer": "neurons",
    "SharedNeuronReport": "neurons",
    "StudyOptions": "study",
    "StudyResult": "study",
    "TensionStudy": "study",
    "Zero": "interventions",
    "ablation_effects": "interventions",
    "inspect_model": "study",
}

__all__ = [
    "AblationContext",
    "ActivationCollector",
    "ActivationSample",
    "ActivationStatistics",
    "Mean",
    "NeuronAttribution",
    "NeuronScores",
    "NeuronSet",
    "OtherResponse",
    "PairRewards",
    "PreferencePair",
    "PreferencePairs",
    "RMTensionError",
    "Resample",
    "RewardHead",
    "Scale",
    "SharedNeuronAnalyzer",
    "SharedNeuronReport",
    "StudyOptions",
    "StudyResult",
    "TensionStudy",
    "Zero",
    "__version__",
    "ablation_effects",
    "inspect_model",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("rmtension")
    if name in _MODULE_OF:
        return getattr(import_module(f"rmtension.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'rmtension' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
