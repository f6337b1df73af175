"""The figure class of `rmtension.plots`, which notebooks display; this module imports matplotlib."""

from io import BytesIO

from matplotlib.figure import Figure


class ShownFigure(Figure):
    """A figure that notebooks display as a picture even if pyplot, which usually arranges that, is not imported."""

    def _repr_png_(self) -> bytes:
        with BytesIO() as file:
            self.savefig(file, format="png", dpi=self.dpi, bbox_inches="tight")
            return file.getvalue()
