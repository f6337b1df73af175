"""The plan of a replication: what every stage runs, on how many tokens, and how long it takes on this machine."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd

from rmtension.attribution._methods import METHODS
from rmtension.data._pairs import PreferencePairs
from rmtension.replication._faithful import COMPARED, STEPS
from rmtension.replication._prepare import PreparedPairs
from rmtension.replication._recipe import Recipe
from rmtension.reward_head import RewardHead
from rmtension.study._family_runs import MODELS, OBJECTIVES, joined
from rmtension.study._options import BEHAVIOUR, StudyOptions
from rmtension.study._speed import Speed, duration, measure_speed, n_read
from rmtension.study._study_cost import study_cost
from rmtension.training._new_classifier import new_classifier

# Seconds of a training step in forward passes of the trained layers: forward, backward and the optimiser.
_TRAINING = 3.7
# Dashboards of neurons, in forward passes over the evaluation pairs.
_DASHBOARDS = 5


def sampled(pairs: Mapping[str, PreferencePairs], n: int) -> dict[str, PreferencePairs]:
    """At most `n` pairs of every objective, drawn with seed 0."""
    return {name: part if len(part) <= n else part.sample(n, seed=0) for name, part in pairs.items()}


def plan_stages(recipe: Recipe, pairs: PreparedPairs, base: Path) -> pd.DataFrame:
    """One row per stage and analysis: what it runs, its passes, the tokens of a pass, and about how many seconds.

    Passes are forward passes, over all models of the stage; a pass with gradients, or one of training, counts as the
    forward passes that take as long. Tokens are those that a pass over both texts of the pairs reads, a shared prompt
    once. A batch of pairs is timed on the untrained model.
    """
    model, tokenizer = new_classifier(base, seed=0)
    head = RewardHead.from_classifier(model.eval(), tokenizer=tokenizer)
    some = joined(sampled(pairs.parts["evaluation"], 32))
    speed = measure_speed(head, some, site=recipe.study.site, fraction=recipe.study.fraction, seed=0)
    density = sum(len(tokenizer(pair.text("chosen"))["input_ids"]) for pair in some) / sum(
        len(pair.text("chosen")) for pair in some
    )
    rows = [
        {
            "stage": stage,
            "what": what,
            "passes": passes,
            "tokens": round(size * density),
            "seconds": round(passes * size * speed.forward, 1),
        }
        for stage, what, passes, size in _stages(recipe, pairs, speed, head.n_layers)
    ]
    return pd.DataFrame(rows)


def plan_text(plan: pd.DataFrame) -> str:
    """The plan as lines, with the sum."""
    lines = [
        f"  {row['stage'] + ', ' + row['what']:<48}{row['passes']:>8.1f} passes of {row['tokens']:>9,} tokens, "
        f"{duration(row['seconds'])}"
        for row in plan.to_dict("records")
    ]
    return "\n".join([f"Plan: about {duration(float(plan['seconds'].sum()))}", *lines])


# -- inside ------------------------------------------------------------------------------------------------------------

# Stage, what, passes, and characters that one pass reads.
_Step = tuple[str, str, float, int]


def _stages(recipe: Recipe, pairs: PreparedPairs, speed: Speed, n_layers: int) -> Iterator[_Step]:
    parts = pairs.parts
    n_seeds = len(recipe.seeds)
    training = recipe.training
    share = 1.0 if training.reward_trained_layers is None else min(1.0, training.reward_trained_layers / n_layers)
    n = {name: len(parts["train"][name]) for name in OBJECTIVES}
    trained = {name: _size(parts["train"][name]) for name in OBJECTIVES}
    trained["mixed"] = round(sum(trained[name] * min(n.values()) / n[name] for name in OBJECTIVES))
    for model in MODELS:
        passes = training.reward_epochs * _TRAINING * share + (1 - share)
        yield "models", f"{n_seeds} x {model}", n_seeds * passes, trained[model]
    yield "behaviour", "rewards of all test pairs", n_seeds * len(MODELS), _size(joined(pairs.test))
    scoring = _size(joined(sampled(parts["scoring"], recipe.n_scoring)))
    evaluating = _size(joined(sampled(parts["evaluation"], recipe.n_evaluating)))
    for rules, options in (("corrected rules", recipe.study), ("published rules", recipe.paper)):
        if options is not None:
            yield from _study(rules, options, speed, n_seeds, scoring, evaluating)
    if recipe.n_single:
        few = _size(joined(sampled(parts["evaluation"], recipe.n_faithful)))
        gradient = speed.gradient / speed.forward
        for method in COMPARED:
            passes = gradient if METHODS[method].runs_backward else 1.0
            if METHODS[method].needs_path:
                passes = 1 + (STEPS + 1) * (n_layers + 1) / 2 + STEPS * (n_layers + 1) / 2 * (gradient - 1)
            yield "faithfulness", method, passes, few
        yield "faithfulness", f"{recipe.n_single} neurons", recipe.n_single * speed.neuron / speed.forward, few
        yield "faithfulness", f"{recipe.n_sets} sets", 1 + recipe.n_sets * speed.ablation / speed.forward, few
    if recipe.n_neurons:
        passes = _DASHBOARDS + 2 * recipe.n_neurons * speed.neuron / speed.forward
        yield "neurons", f"{recipe.n_neurons} dashboards", passes, evaluating


def _study(
    rules: str, options: StudyOptions, speed: Speed, n_seeds: int, scoring: int, evaluating: int
) -> Iterator[_Step]:
    options = replace(options, analyses=analyses_of_neurons(options))
    for row in study_cost(options, has_base=True).to_dict("records"):
        scored = row["forward"] + row["gradient"] * speed.gradient / speed.forward
        ablated = row["rewards"] + row["ablations"] * speed.ablation / speed.forward
        if scored:
            yield rules, f"{row['analysis']}: scoring", n_seeds * scored, scoring
        if ablated:
            yield rules, f"{row['analysis']}: ablations", n_seeds * ablated, evaluating


def analyses_of_neurons(options: StudyOptions) -> tuple[str, ...]:
    """The analyses that sampled pairs suffice for."""
    return tuple(name for name in options.analyses if name not in BEHAVIOUR)


def _size(pairs: PreferencePairs) -> int:
    """The characters that a pass reads."""
    return sum(map(n_read, pairs))
