"""Reports of a study: findings, tables, figures and single neurons, as text, Markdown and one HTML page."""

from rmtension.report._every_format import write_report
from rmtension.report._main_findings import findings
from rmtension.report._neurons_of_study import study_neurons
from rmtension.report._text import to_text

__all__ = ["findings", "study_neurons", "to_text", "write_report"]
