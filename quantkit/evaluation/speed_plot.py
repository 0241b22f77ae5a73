"""Pictures of measured speed. matplotlib is imported when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantkit.errors import RequestError


def plot_kernels(report: dict[str, Any], file: Path) -> None:
    """Microseconds of every competitor in every cell with the fewest tokens, beside the floor; one panel per shape.

    Args:
        report: of `kernel_speed.bench_kernels`.
        file: its ending is the format of the picture.

    Raises:
        RequestError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise RequestError("a plot needs matplotlib; run: pip install 'quantkit[report]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    fewest = min(cell["tokens"] for cell in report["cells"])
    cells = [cell for cell in report["cells"] if cell["tokens"] == fewest]
    shapes = list(dict.fromkeys((cell["out_features"], cell["in_features"]) for cell in cells))
    names = list(dict.fromkeys(each["name"] for cell in cells for each in cell["results"]))
    figure, panels = pyplot.subplots(1, len(shapes), figsize=(1.5 + 4 * len(shapes), 4), squeeze=False)
    for panel, shape in zip(panels[0], shapes, strict=True):
        here = [cell for cell in cells if (cell["out_features"], cell["in_features"]) == shape]
        for name in names:
            found = [
                (place, each["microseconds"])
                for place, cell in enumerate(here)
                for each in cell["results"]
                if each["name"] == name
            ]
            places, times = [place for place, _ in found], [time for _, time in found]
            panel.plot(places, times, "D" if name == "quantkit" else "o", label=name)
        panel.plot(range(len(here)), [cell["floor_us"] for cell in here], "k_", markersize=14, label="floor")
        panel.set_xticks(range(len(here)), [cell["format"] for cell in here], rotation=45, ha="right")
        panel.set_title(f"{shape[0]} x {shape[1]}, {fewest} token{'s' if fewest > 1 else ''}")
        panel.set_yscale("log")
        panel.set_ylabel("µs")
    panels[0][-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
