"""The figures of `rmtension.plots`, which a notebook shows; imports matplotlib."""

from io import BytesIO

from matplotlib.figure import Figure


class ShownFigure(Figure):
    """A figure that is a picture in a notebook, also where pyplot, which would see to that, was never used."""

    def _repr_png_(self) -> bytes:
        with BytesIO() as file:
            self.savefig(file, format="png", dpi=self.dpi, bbox_inches="tight")
            return file.getvalue()
