"""The page of neuron dashboards: one HTML file that loads nothing, and its section for reports."""

import base64
import hashlib
from functools import cache
from importlib.resources import files

import jinja2
from markupsafe import Markup

from rmtension.attribution._dashboard_data import DashboardData
from rmtension.attribution._dashboard_drawing import section_values


@cache
def page_part(name: str) -> str:
    """A file of the page: `neurons.css`, `neurons.js`, or a template."""
    return (files("rmtension.attribution") / "page" / name).read_text(encoding="utf-8")


def policy_hash(text: str) -> str:
    """The hash by which the page's security policy allows its own script or style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def template_of(text: str) -> jinja2.Template:
    """A template that escapes all values and refuses names without one."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(text)


def neuron_section(data: DashboardData) -> Markup:
    """The section on single neurons, for a page that has `neurons.css` and `neurons.js`."""
    return Markup(template_of(page_part("neurons.html")).render(neurons=section_values(data)))  # noqa: S704 - Jinja escapes the data


def page_html(data: DashboardData) -> str:
    """The text of the page."""
    style, script = (page_part(f"neurons.{end}") for end in ("css", "js"))
    return template_of(page_part("page.html")).render(
        title=f"{len(data.neurons)} {data.about['site']} neurons of {data.about['architecture']}",
        style=style,
        script=script,
        style_hash=policy_hash(style),
        script_hash=policy_hash(script),
        section=neuron_section(data),
        about=_about(data),
    )


# -- parts -------------------------------------------------------------------------------------------------------------


def _about(data: DashboardData) -> list[tuple[str, str]]:
    """What the dashboards were computed from."""
    about = data.about
    rows = [(name, str(about[name])) for name in ("model", "architecture", "site", "method", "positions", "seed")]
    return rows + [(f"pairs of {name}", f"{n}, digest {about['digests'][name]}") for name, n in about["pairs"].items()]
