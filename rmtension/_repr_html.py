"""How results are displayed in a notebook: one line that says what they are, and a small table.

Every text is escaped, because ids, objectives and names of models come from files of other people. No colours and
styles are set, so that the notebook's own theme, light or dark, applies.
"""

import math
from html import escape
from numbers import Integral, Real

import pandas as pd

N_ROWS = 5


def html_table(caption: str, frame: pd.DataFrame, *, n_of: int | None = None) -> str:
    """`caption` above the rows of `frame`; `n_of` is the total number of rows if `frame` has only some of them.

    Numbers are shown with four significant digits, missing values as empty cells.

    Examples:
        >>> print(html_table("Rewards", pd.DataFrame({"id": ["<b>"], "chosen": [1 / 3]})))
        <div><p>Rewards</p>
        <table><thead><tr><th>id</th><th>chosen</th></tr></thead>
        <tbody><tr><td>&lt;b&gt;</td><td>0.3333</td></tr></tbody></table></div>
    """
    if not len(frame):
        return f"<div><p>{escape(caption)}</p></div>"
    head = "".join(f"<th>{escape(str(name))}</th>" for name in frame.columns)
    rows = frame.astype(object).itertuples(index=False, name=None)
    body = "\n".join(f"<tr>{''.join(f'<td>{escape(_shown(value))}</td>' for value in row)}</tr>" for row in rows)
    more = "" if n_of is None or n_of <= len(frame) else f"\n<p>{len(frame):,} of {n_of:,} rows</p>"
    table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
    return f"<div><p>{escape(caption)}</p>\n{table}{more}</div>"


def _shown(value: object) -> str:
    if value is None or value is pd.NA:
        return ""
    if isinstance(value, Real) and not isinstance(value, Integral):
        return "" if math.isnan(value) else f"{float(value):.4g}"
    return str(value)
