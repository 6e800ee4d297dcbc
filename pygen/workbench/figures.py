"""The figures of the comparison, as PNG or SVG: sheets of samples, the way from Z to X, quality against passes."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pygen.model import Stage
from pygen.workbench import require
from pygen.workbench.families import FAMILIES

TITLES = {
    "gan": "GAN",
    "vae": "VAE",
    "flow": "Flow",
    "diffusion": "Diffusion",
    "autoregressive": "Autoregressive",
}
# The colour-blind safe palette of Okabe and Ito.
COLOURS = {
    "gan": "#D55E00",
    "vae": "#009E73",
    "flow": "#0072B2",
    "diffusion": "#CC79A7",
    "autoregressive": "#B8860B",
}
INK = "#22252b"
FAINT = "#8a8f98"
GAP = 0.86
# The salt makes the same figure the same bytes.
STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "svg.hashsalt": "pygen",
}


def name_of(family: str, recipe: str) -> str:
    """What to call a family, with its recipe where it has several."""
    return f"{TITLES[family]} ({recipe})" if len(FAMILIES[family]) > 1 else TITLES[family]


def is_ink(pictures: Tensor) -> bool:
    """Whether pictures (n, channels, height, width) in [-1, 1] are bright strokes on black, to be shown as ink."""
    if pictures.shape[1] != 1:
        return False
    corners = pictures[:, 0, :: max(pictures.shape[2] - 1, 1), :: max(pictures.shape[3] - 1, 1)]
    return bool(corners.median() <= -0.99)


def sheet(pictures: Tensor, columns: int, *, ink: bool = False) -> np.ndarray[Any, Any]:
    """Pictures (n, channels, height, width) in [-1, 1], row by row, as one array (height, width, 3) in [0, 1]."""
    n, _channels, height, width = pictures.shape
    rows = math.ceil(n / columns)
    canvas = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, 3), GAP)
    for i, picture in enumerate(pictures):
        top, left = (i // columns) * (height + 1) + 1, (i % columns) * (width + 1) + 1
        canvas[top : top + height, left : left + width] = _as_rgb(picture, ink=ink)
    return canvas


def sheet_png(pictures: Tensor, columns: int, *, ink: bool = False, zoom: int = 5) -> bytes:
    """`sheet` as PNG, each value `zoom` pixels wide."""
    canvas = (sheet(pictures, columns, ink=ink) * 255).round().astype(np.uint8)
    image = require("PIL.Image", "PNG files").fromarray(canvas.repeat(zoom, 0).repeat(zoom, 1))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def samples_beside_real(samples: Tensor, real: Tensor, title: str, *, columns: int, ink: bool = False) -> bytes:
    """PNG of a sheet of samples beside a sheet of real pictures, both (n, channels, height, width)."""
    with _style():
        sheets = [sheet(real, columns, ink=ink), sheet(samples, columns, ink=ink)]
        height, width = sheets[0].shape[:2]
        inches = 3.4
        figure = _figure(figsize=(2 * inches + 0.5, inches * height / width + 0.45), layout="constrained")
        for i, (canvas, name) in enumerate(zip(sheets, ("Real, held out", title), strict=True)):
            axes = figure.add_subplot(1, 2, i + 1)
            axes.imshow(canvas, interpolation="nearest")
            axes.set_title(name, loc="left", fontsize=11)
            axes.set_axis_off()
        return _save(figure, "png")


def crossing(ways: Mapping[str, Sequence[Stage]], *, ink: bool = False, stops: int = 12) -> bytes:
    """PNG with one band per family: the stages of a few samples from Z, left, to X, right, at most `stops` of them."""
    with _style():
        rows = max(len(stages[-1].values) for stages in ways.values())
        columns = min(stops, max(len(stages) for stages in ways.values()))
        figure = _figure(figsize=(0.84 * columns + 1.5, len(ways) * (rows * 0.76 + 0.62)))
        bands = figure.subfigures(len(ways), 1, squeeze=False)[:, 0]
        for band, (family, stages) in zip(bands, ways.items(), strict=True):
            _band(band, family, stages, columns=columns, rows=rows, ink=ink)
        return _save(figure, "png")


def quality_against_passes(
    curve: Sequence[Mapping[str, float]],
    points: Mapping[str, tuple[int, float, float]],
    *,
    real: float,
    noise: float,
) -> bytes:
    """SVG: Frechet distance against network passes, and against seconds per 100 samples.

    curve: one entry per number of steps of the diffusion model; points: (passes, seconds, Frechet distance) per family.
    """
    with _style():
        figure = _figure(figsize=(9.2, 3.7), layout="constrained")
        left = figure.add_subplot(1, 2, 1)
        right = figure.add_subplot(1, 2, 2, sharey=left)
        for axes, key, which in ((left, "network_passes", 0), (right, "sample_seconds", 1)):
            colour = COLOURS["diffusion"]
            if curve:
                axes.plot([c[key] for c in curve], [c["frechet"] for c in curve], "-o", color=colour, markersize=4)
            for family, point in points.items():
                axes.plot(point[which], point[2], "D", color=COLOURS[family], markersize=7, label=TITLES[family])
            axes.axhline(real, color=INK, linestyle=(0, (4, 3)), linewidth=1)
            axes.axhline(noise, color=FAINT, linestyle=(0, (1, 2)), linewidth=1)
            axes.set_yscale("log")
            axes.grid(axis="y", color="#ececec", linewidth=0.8)
            axes.set_axisbelow(True)
        left.set_xscale("log", base=2)
        right.set_xscale("log")
        _plain_ticks(left, [c["network_passes"] for c in curve] or [p[0] for p in points.values()])
        left.set_xlabel("network passes")
        right.set_xlabel("seconds for 100 samples")
        left.set_ylabel("Fréchet distance (log), less is better")
        right.tick_params(labelleft=False)
        for value, name, above in ((real, "real training pictures", -1), (noise, "noise", 1)):
            right.annotate(
                name, (1, value), xycoords=("axes fraction", "data"), xytext=(0, 3 * above), textcoords="offset points",
                ha="right", va="bottom" if above > 0 else "top", fontsize=8, color=FAINT,
            )  # fmt: skip
        low, high = left.get_ylim()
        left.set_ylim(low / 1.4, high * 1.2)
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
        return _save(figure, "svg")


def _style() -> Any:
    return require("matplotlib", "the figures of a comparison").rc_context(STYLE)


def _figure(**settings: Any) -> Any:
    return require("matplotlib.figure", "the figures of a comparison").Figure(**settings)


def _band(band: Any, family: str, stages: Sequence[Stage], *, columns: int, rows: int, ink: bool) -> None:
    shown = _thin(stages, columns)
    between = f"{len(stages) - 2} stops\nbetween" + (f",\n{len(shown) - 2} shown" if len(shown) < len(stages) else "")
    colour = COLOURS.get(family, INK)
    band.text(0.01, 0.97, TITLES.get(family, family), color=colour, weight="bold", va="top", fontsize=11)
    band.text(
        0.01, 0.8, "one jump" if len(stages) == 2 else between, color=FAINT, va="top", fontsize=8, linespacing=1.4
    )
    grid = band.add_gridspec(rows, columns, left=0.14, right=0.995, top=0.8, bottom=0.03, wspace=0.14, hspace=0.1)
    for j, stage in enumerate(shown):
        last = j == len(shown) - 1
        # However few the stages are, X stands at the right, under the X of the other families.
        column = columns - 1 if last else j
        scale = 1.0 if last else _spread(stage.values)
        for i, values in enumerate(stage.values):
            axes = band.add_subplot(grid[i, column])
            axes.imshow(_as_rgb(_as_picture(values) / scale, ink=ink), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set(visible=True, color="#d4d4d4", linewidth=0.6)
            if i == 0:
                axes.set_title(stage.label.replace(", ", "\n").replace(" of ", "\nof "), fontsize=7.5, pad=3)
    if len(shown) == 2 < columns:
        for i in range(rows):
            axes = band.add_subplot(grid[i, 1:-1])
            axes.set_axis_off()
            axes.annotate(
                "", (0.97, 0.5), (0.03, 0.5), xycoords="axes fraction", textcoords="axes fraction",
                arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.2},
            )  # fmt: skip


def _thin(stages: Sequence[Stage], stops: int) -> list[Stage]:
    """At most `stops` of the stages, evenly spaced, the first and the last among them."""
    if len(stages) <= stops:
        return list(stages)
    return [stages[round(i * (len(stages) - 1) / (stops - 1))] for i in range(stops)]


def _spread(values: Tensor) -> float:
    """What maps all but the outermost hundredth of the values into [-1, 1], and at least 1."""
    finite = values[torch.isfinite(values)].float().abs()
    return max(1.0, float(finite.quantile(0.99))) if finite.numel() else 1.0


def _as_picture(values: Tensor) -> Tensor:
    """One sample's values as (1 or 3, height, width): vectors folded to a square, many channels tiled."""
    values = values.detach().float().cpu()
    if values.ndim == 2:
        values = values[None]
    if values.ndim != 3:
        values = values.reshape(-1, 1, 1)
    if len(values) in (1, 3):
        return values
    channels, height, width = values.shape
    across = math.ceil(math.sqrt(channels))
    down = math.ceil(channels / across)
    tiled = torch.full((down * across, height, width), math.nan)
    tiled[:channels] = values
    return tiled.reshape(down, across, height, width).permute(0, 2, 1, 3).reshape(1, down * height, across * width)


def _as_rgb(picture: Tensor, *, ink: bool) -> np.ndarray[Any, Any]:
    """A picture (1 or 3, height, width) in [-1, 1] as (height, width, 3) in [0, 1]; what is not finite, as the gap."""
    values = (picture.detach().float().cpu().numpy().clip(-1, 1) + 1) / 2
    if ink:
        values = 1 - values
    values = np.where(np.isfinite(values), values, GAP)
    if len(values) != 3:
        values = values[:1].repeat(3, 0)
    rows: np.ndarray[Any, Any] = values.transpose(1, 2, 0)
    return rows


def _plain_ticks(axes: Any, ticks: Sequence[float]) -> None:
    axes.set_xticks(list(ticks), [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _save(figure: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    stamp = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    figure.savefig(buffer, format=kind, dpi=170, facecolor="white", metadata=stamp)
    return buffer.getvalue()
