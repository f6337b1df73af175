"""The page of a repair: what was closed and at what cost, controls, every candidate, and the diagnosis before it."""

from collections.abc import Iterator
from dataclasses import asdict

import pandas as pd

from rmtension import plots
from rmtension.evaluation._intervals import with_interval
from rmtension.repair._receipt import RepairReport, as_json
from rmtension.report._figures import NO_FIGURES, as_picture, can_draw_figures
from rmtension.report._page import Answer, Page, PageSection, Reproduction, rounded


def repair_page(report: RepairReport) -> Page:
    """All that the page of a repair shows."""
    diagnosis, drawn = report.diagnosis, can_draw_figures()
    weak, strong = diagnosis.weak, diagnosis.strong
    return Page(
        f"Repair of {weak}: {report.edit['kind']}",
        Answer(
            report.findings(),
            as_picture(plots.closed_share(report.closed, report.controls), "closed.png") if drawn else None,
            note=(
                f"Intervals are {100 * report.closed.level:g}% over prompts, on {report.closed.n:,} test pairs of "
                f"{weak} that neither the fit nor any choice has seen. The gap is the accuracy of the ceiling (what "
                f"can be reached) minus that of the model, without pairs that {weak} and {strong} label in opposite "
                "ways."
            ),
            table=_controls(report.controls),
            table_summary="The controls",
        ),
        list(_sections(report, drawn=drawn)),
        question=f"How much of what {weak} lacks does an edit give back, and what does it cost {strong}?",
        provenance=Reproduction(
            "This code repairs a model in this way. Replace the names with those of your checkpoint and pairs.",
            _code(report),
            as_json({"edit": dict(report.edit), "diagnosis": asdict(diagnosis)}),
        ),
    )


def _sections(report: RepairReport, *, drawn: bool) -> Iterator[PageSection]:
    diagnosis, without = report.diagnosis, "" if drawn else NO_FIGURES
    yield PageSection(
        "What the edit changed",
        "Accuracy and margin of both objectives, accuracy where refusing or responding is right (if labelled) and on "
        "pairs matched in length, and how often the best of several responses is one that is never rejected. "
        f"{without}".strip(),
        pictures=[as_picture(plots.repair_checks(report.checks, most_lost=report.most_lost), "checks.png")]
        if drawn
        else [],
        table=_checks(report.checks),
    )
    yield PageSection(
        "What was known before",
        "The diagnosis, on development pairs, before anything was edited.",
        lines=repr(diagnosis).splitlines()[1:],
    )
    yield PageSection(
        "Every candidate",
        f"All edits that were tried, on development pairs. Of those that spare {diagnosis.strong} and gain beyond "
        "chance, the smallest one is taken whose gain is within one standard error of the largest gain.",
        pictures=[as_picture(plots.repair_path(report.path), "path.png")] if drawn and _varies(report.path) else [],
        table=rounded(report.path),
    )


def _checks(checks: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "quantity": row["quantity"],
            "before": f"{row['before']:.3f}",
            "after": f"{row['after']:.3f}",
            "change": with_interval(row["change"], row["low"], row["high"], form="+.3f"),
            "lower end within the allowed loss": "" if pd.isna(row["spared"]) else "yes" if row["spared"] else "no",
            "n": str(row["n"]),
        }
        for row in checks.to_dict("records")
    )


def _controls(controls: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "control": kind,
            "fits": str(len(part)),
            "closed share": f"{part['closed'].mean():.3f}",
            "from": f"{part['closed'].min():.3f}",
            "to": f"{part['closed'].max():.3f}",
            "change of the strong objective": f"{part['strong_change'].mean():+.3f}",
            "numbers": f"{round(part['numbers'].mean()):,}",
        }
        for kind, part in controls.groupby("control", sort=False)
    )


def _varies(path: pd.DataFrame) -> bool:
    """Whether candidates differ in how many numbers they change."""
    return "numbers" in path and len(set(path["numbers"])) > 1


def _code(report: RepairReport) -> str:
    weak, strong = report.diagnosis.weak, report.diagnosis.strong
    return "\n".join(
        [
            "from rmtension import PreferencePairs, RewardHead",
            "from rmtension.repair import repair",
            "from rmtension.report import write_report",
            "",
            'head = RewardHead.from_pretrained("model")',
            f'pairs = {{name: PreferencePairs.read(f"{{name}}.jsonl") for name in {(weak, strong)!r}}}',
            f"mended = repair(head, pairs, {report.edit['kind']!r}, weak={weak!r}, strong={strong!r})",
            'mended.save_pretrained("mended")',
            'write_report(mended.report, "mended")',
        ]
    )
