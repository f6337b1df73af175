"""What each subtask of the public benchmarks rewards: helpfulness, or refusing or responding where that is right."""

from dataclasses import dataclass

__all__ = ["GROUPS", "REFUSE_SUBSETS", "RESPOND_SUBSETS", "Subtask"]


@dataclass(frozen=True)
class Subtask:
    """One subtask of a benchmark, and what its chosen responses are preferred for.

    `right` says what the chosen response of a harmless subtask does with the request: "refuse" or "respond". It is None
    for helpful subtasks and for subtasks that mix both. `subset` is the subset of its pairs.

    Examples:
        >>> [subtask.subset for subtask in GROUPS if subtask.right == "respond"]
        ['reward-bench/xstest-should-respond', 'rm-bench/safety-response']
        >>> set(RESPOND_SUBSETS) & set(REFUSE_SUBSETS)
        set()
    """

    benchmark: str
    name: str
    objective: str
    right: str | None = None

    @property
    def subset(self) -> str:
        """The `subset` of its pairs: benchmark and name."""
        return f"{self.benchmark}/{self.name}"


# RewardBench's subtasks of code, which its loader drops by default.
CODE = ("hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust")
_HH_HELPFUL = ("helpful-base", "helpful-online", "helpful-rejection-sampled")
_REWARD_BENCH_HELPFUL = (
    *("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med", "mt-bench-hard"),
    *("llmbar-natural", "llmbar-adver-neighbor", "llmbar-adver-GPTInst", "llmbar-adver-GPTOut", "llmbar-adver-manual"),
    "math-prm",
)
_REFUSALS = ("refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "donotanswer")

# What each subtask rewards. Without code and ties (which the loaders drop) and without HH-RLHF (which models are
# trained on), 18 subtasks are helpful and 8 harmless; 6 of those reward refusing and 2 responding. arXiv 2606.13209
# counts 8, 6 and 2 as well, but 17 helpful ones. Which of the 18 it omits is not known, so its mean over helpful
# subtasks is not exactly the mean over these. RewardBench 2's Safety is listed under refusing as in that study,
# although its card says that some of its requests deserve an answer. RMB is not listed: its rows name their own
# objective, and the study does not use them.
GROUPS: tuple[Subtask, ...] = (
    *(Subtask("hh-rlhf", name, "helpful") for name in _HH_HELPFUL),
    Subtask("hh-rlhf", "harmless-base", "harmless"),
    *(Subtask("reward-bench", name, "helpful") for name in (*_REWARD_BENCH_HELPFUL, *CODE)),
    *(Subtask("reward-bench", name, "harmless", "refuse") for name in _REFUSALS),
    Subtask("reward-bench", "xstest-should-respond", "harmless", "respond"),
    *(Subtask("reward-bench-2", name, "helpful") for name in ("Factuality", "Precise IF", "Math", "Focus", "Ties")),
    Subtask("reward-bench-2", "Safety", "harmless", "refuse"),
    *(Subtask("rm-bench", name, "helpful") for name in ("chat", "math", "code")),
    Subtask("rm-bench", "safety-refuse", "harmless", "refuse"),
    Subtask("rm-bench", "safety-response", "harmless", "respond"),
)
"""Every subtask, with what it rewards."""

REFUSE_SUBSETS = tuple(subtask.subset for subtask in GROUPS if subtask.right == "refuse")
"""Subsets that reward refusing, for `rmtension.evaluation.balance(scored, refuse=...)`."""

RESPOND_SUBSETS = tuple(subtask.subset for subtask in GROUPS if subtask.right == "respond")
"""Subsets that reward responding, for `rmtension.evaluation.balance(scored, respond=...)`."""
