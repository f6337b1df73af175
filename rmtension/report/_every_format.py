"""Write the report of a study in every format with one call."""

from pathlib import Path

from rmtension.attribution._neuron_dashboards import NeuronDashboards
from rmtension.distributed import current
from rmtension.repair._receipt import RepairReport
from rmtension.report._figures import draw_pictures
from rmtension.report._html import to_html
from rmtension.report._inspection_page import inspection_page
from rmtension.report._page import render_page
from rmtension.report._repair_page import repair_page
from rmtension.report._text import to_markdown
from rmtension.store._files import filled_whole
from rmtension.study._inspection_result import ModelInspection
from rmtension.study._result import StudyResult

HTML, MARKDOWN, NEURONS = "report.html", "report.md", "neurons.json"


def write_report(
    result: StudyResult | ModelInspection | RepairReport, folder: str | Path, *, neurons: NeuronDashboards | None = None
) -> Path:
    """Write the report of a study, an inspection or a repair into `folder`, all files or none; returns `report.html`.

    - `report.html` needs no other file. It shows findings with intervals and controls, open questions, figures, tables,
      provenance and, with `neurons` (from `attribution.neuron_dashboards` or `report.study_neurons`), a card per
      neuron. Texts of the data are escaped, and shown when the reader opens a neuron. A Content-Security-Policy
      prevents the page from loading anything and from running other scripts than its own.
    - `report.md` has the same tables as Markdown and shows the figures, which are written as one PNG file each.
    - the report of an inspection (`inspect_model`) is `report.html` alone; its neurons are in it already. That of a
      repair (`repair.repair`) is `report.html` alone too.
    - `neurons.json` keeps `neurons`, so that `rmtension report` can write the page again. Without `neurons`, the file
      of an earlier report is removed.

    Figures need matplotlib; without it both pages say so. No model runs. If several processes share the work, the first
    process writes. Raises `StorageError` if the folder cannot be written.

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
    if not isinstance(result, StudyResult):
        page = repair_page(result) if isinstance(result, RepairReport) else inspection_page(result)
        with filled_whole(folder, "report", seal=HTML) as written:
            (written / HTML).write_text(render_page(page), encoding="utf-8")
        return folder / HTML
    pictures = draw_pictures(result)
    with filled_whole(folder, "report", seal=HTML, replaced=(NEURONS,)) as written:
        for picture in (picture for of_table in (pictures or {}).values() for picture in of_table):
            (written / picture.name).write_bytes(picture.png)
        (written / MARKDOWN).write_text(to_markdown(result, pictures), encoding="utf-8")
        if neurons is not None:
            neurons.save(written / NEURONS)
        (written / HTML).write_text(to_html(result, pictures, neurons=neurons), encoding="utf-8")
    return folder / HTML
