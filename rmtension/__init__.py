"""Open reward models: which neurons carry helpfulness and harmlessness, and what each loses without them.

Names resolve when first used, so that `import rmtension` loads none of the large libraries.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rmtension.ablation import AblationContext
    from rmtension.activations import ActivationCollector, ActivationSample, ActivationStatistics
    from rmtension.attribution import NeuronAttribution
    from rmtension.errors import RMTensionError
    from rmtension.neuron_scores import NeuronScores
    from rmtension.neurons import NeuronSet
    from rmtension.pair import PreferencePair
    from rmtension.pairs import PreferencePairs
    from rmtension.replacements import Mean, OtherResponse, Resample, Scale, Zero
    from rmtension.reward_head import RewardHead
    from rmtension.scored import PairRewards
    from rmtension.shared import SharedNeuronAnalyzer, SharedNeuronReport
    from rmtension.study import TensionStudy
    from rmtension.study_options import StudyOptions
    from rmtension.study_result import StudyResult

_MODULE_OF = {
    "AblationContext": "ablation",
    "ActivationCollector": "activations",
    "ActivationSample": "activations",
    "ActivationStatistics": "activations",
    "Mean": "replacements",
    "NeuronAttribution": "attribution",
    "NeuronScores": "neuron_scores",
    "NeuronSet": "neurons",
    "OtherResponse": "replacements",
    "PreferencePair": "pair",
    "PreferencePairs": "pairs",
    "RMTensionError": "errors",
    "Resample": "replacements",
    "RewardHead": "reward_head",
    "Scale": "replacements",
    "PairRewards": "scored",
    "SharedNeuronAnalyzer": "shared",
    "SharedNeuronReport": "shared",
    "StudyOptions": "study_options",
    "StudyResult": "study_result",
    "TensionStudy": "study",
    "Zero": "replacements",
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
