"""Writing a study's report: one call for every format."""

from pathlib import Path

from rmtension.attribution._neuron_pages import NeuronPages
from rmtension.distributed import current
from rmtension.report._figures import draw_pictures
from rmtension.report._html import to_html
from rmtension.report._text import to_markdown
from rmtension.store._files import filled_whole
from rmtension.study._result import StudyResult

HTML, MARKDOWN, NEURONS = "report.html", "report.md", "neurons.json"


def write_report(result: StudyResult, folder: str | Path, *, neurons: NeuronPages | None = None) -> Path:
    """Write a study into `folder` for reading, all files or none; returns the path of `report.html`.

    - `report.html` needs no other file: findings with intervals and controls, what is open, figures, tables,
      provenance, and with `neurons` (`attribution.examine`, `report.study_neurons`) a page for each of them.
      Texts of the data are escaped, and folded until the reader opens them. A rule in the page
      (Content-Security-Policy) keeps it from loading anything and from running any script but its own.
    - `report.md` has the same tables as Markdown, and shows the figures, which are written as one PNG each.
    - `neurons.json` keeps `neurons`, from which `rmtension report` writes the page again. Without `neurons`, one that
      an earlier report left is removed.

    Figures need matplotlib; without it both pages say so. No model is run. Of several processes that share the work,
    the first one writes. Raises `StorageError` where the folder cannot be written.

    Examples:
        >>> from rmtension import StudyOptions, TensionStudy
        >>> models = dict.fromkeys(("helpful", "harmless", "mixed"), head)
        >>> study = TensionStudy(models, pairs, options=StudyOptions(analyses=("transferability",)))
        >>> write_report(study.run(progress=False), "study").name
        'report.html'
    """
    folder = Path(folder)
    if not current().is_first:
        return folder / HTML
    pictures = draw_pictures(result)
    with filled_whole(folder, "report", seal=HTML, replaced=(NEURONS,)) as place:
        for one in (one for some in (pictures or {}).values() for one in some):
            (place / one.name).write_bytes(one.png)
        (place / MARKDOWN).write_text(to_markdown(result, pictures), encoding="utf-8")
        if neurons is not None:
            neurons.save(place / NEURONS)
        (place / HTML).write_text(to_html(result, pictures, neurons=neurons), encoding="utf-8")
    return folder / HTML
