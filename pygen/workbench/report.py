"""The comparison as one HTML page that needs nothing else: figures inline, no scripts, no fonts to fetch."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from typing import Any

from pygen.workbench.figures import COLOURS, TITLES, name_of

STYLE = """
:root { color-scheme: light; --ink: #22252b; --soft: #5d636e; --line: #e3e1dc; --paper: #fdfcfa; --wash: #f4f2ed; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 48px 28px 72px; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; margin: 3.2rem 0 .5rem; letter-spacing: -0.01em; }
p { max-width: 46rem; margin: .5rem 0 1rem; }
.lead { font-size: 1.1rem; color: var(--soft); }
.note, figcaption { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums;
  margin: 1.2rem 0; }
th, td { padding: .5rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; font-size: .8rem; color: var(--soft); vertical-align: bottom; line-height: 1.3; }
th small, td small { display: block; font-weight: 400; font-size: .74rem; color: var(--soft); }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
thead th { border-bottom: 2px solid var(--ink); }
tr.yardstick td { background: var(--wash); }
td.best { font-weight: 700; }
.dot { display: inline-block; width: .68em; height: .68em; border-radius: 50%; margin-right: .5em; }
.sheets { display: grid; grid-template-columns: repeat(3, 1fr); gap: 22px; margin: 1.2rem 0; }
figure { margin: 0; }
.sheets img { width: 100%; image-rendering: pixelated; display: block; border: 1px solid var(--line); }
.sheets figcaption { margin-top: .45rem; }
.sheets b { color: var(--ink); }
.full img, .full svg { width: 100%; height: auto; display: block; background: #fff; 
  border: 1px solid var(--line); padding: 10px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.4rem; font-size: .92rem; }
dt { color: var(--soft); }
dd { margin: 0; }
code { font: .88em ui-monospace, "DejaVu Sans Mono", monospace; background: var(--wash); padding: .1em .35em; }
@media (max-width: 760px) { .sheets { grid-template-columns: repeat(2, 1fr); } main { padding: 28px 16px; } }
@media print { h2 { break-after: avoid; } figure, tr { break-inside: avoid; } }
"""

FEW_CLASSES = 5
"""With fewer classes than this the features of the judge's classifier are poor, and the report says so."""
SMALL = 1024
"""Pictures with fewer values than this are compared on one thread."""
SUBJECT = {
    "gan": "The GAN",
    "vae": "The VAE",
    "flow": "The flow",
    "diffusion": "The diffusion model",
    "autoregressive": "The autoregressive model",
}
SAYING = {
    "gan": "one jump",
    "vae": "one jump",
    "flow": "layer by layer",
    "diffusion": "step by step",
    "autoregressive": "pixel by pixel",
}


def render(summary: Mapping[str, Any], sheets: Mapping[str, bytes], crossing: bytes, passes_svg: bytes) -> str:
    """The page. sheets: PNG of "real" and of each family; crossing: PNG; passes_svg: SVG."""
    families = summary["families"]
    sections = [
        _head(summary),
        _table(summary),
        _samples(families, sheets),
        _crossing(crossing),
        _passes(summary, passes_svg),
        _method(summary),
        _machine(summary),
    ]
    title = html.escape(f"Five ways to generate {summary['data']['name']}" if len(families) == 5 else "A comparison")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def number(value: float | None, digits: int = 2) -> str:
    """A number with so many digits after the point, or a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def seconds(value: float | None) -> str:
    """A duration with two significant digits, in ms below a second."""
    if value is None:
        return "–"
    if value < 1:
        return f"{value * 1000:.2g} ms" if value < 0.1 else f"{value * 1000:.0f} ms"
    return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"


def bits(row: Mapping[str, Any]) -> str:
    """Bits per dimension: exact, marked as a bound that the true cost is at most, or a dash."""
    if row["bits_per_dim"] is None:
        return "–"
    return ("≤ " if row["bits_kind"] == "bound" else "") + number(row["bits_per_dim"])


def terminal_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows as a table for a terminal, 92 columns wide; a row may lack the columns of costs."""
    head = ("", "density", "bits/dim", "Frechet", "prec.", "recall", "classes", "100 samples", "passes", "training")
    lines: list[tuple[str, ...]] = [head]
    for name, row in rows.items():
        passes, taken = row.get("network_passes"), row.get("train_seconds")
        lines.append(
            (
                name_of(name, row["recipe"]) if "recipe" in row else name,
                row.get("density") or "-",
                bits({"bits_per_dim": None, **row}).replace("≤ ", "<="),
                number(row["frechet"]),
                *(number(row[key]) for key in ("precision", "recall", "coverage")),
                seconds(row.get("sample_seconds")),
                "-" if passes is None else str(passes),
                seconds(taken),
            )
        )
    plain = [[cell.replace("–", "-") for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*plain, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in plain
    )


def _head(summary: Mapping[str, Any]) -> str:
    families, data = summary["families"], summary["data"]
    near = min(families, key=lambda family: families[family]["frechet"])
    sentences = [
        f"{SUBJECT[near]} comes nearest to real pictures (Fréchet distance {number(families[near]['frechet'])}; "
        f"real training pictures: {number(summary['real']['frechet'])})."
    ]
    priced = {family: row["bits_per_dim"] for family, row in families.items() if row["bits_per_dim"] is not None}
    if len(priced) > 1:
        cheap = min(priced, key=lambda family: priced[family])
        sentences.append(
            f"{SUBJECT[cheap]} warrants the fewest bits for held-out pictures ({bits(families[cheap])} per value)."
        )
    fast = min(families, key=lambda family: families[family]["sample_seconds"])
    sentences.append(
        f"{SUBJECT[fast]} is the quickest to sample ({seconds(families[fast]['sample_seconds'])} for 100)."
    )
    title = f"Five ways to generate {data['name']}" if len(families) == 5 else f"Generating {data['name']}"
    channels, height, width = data["shape"]
    count = f"{len(families)} families" if len(families) > 1 else "One family"
    taken = [row["train_seconds"] for row in families.values()]
    effort = "for about the same time" if max(taken) <= 2 * min(taken) else "for a fixed number of steps each"
    lead = (
        f"{count} of generative models, trained on the same {data['train']:,} pictures "
        f"({height} × {width}{' in colour' if channels == 3 else ''}, {data['levels']} levels) "
        f"{effort}, and held against the same {data['test']:,} pictures that none of them saw."
    )
    return (
        f'<h1>{html.escape(title)}</h1>\n<p class="lead">{html.escape(lead)}</p>\n'
        f"<p>{html.escape(' '.join(sentences))}</p>"
    )


def _table(summary: Mapping[str, Any]) -> str:
    families = summary["families"]
    least = ("bits_per_dim", "frechet", "sample_seconds")
    best: dict[str, float] = {}
    for key in (*least, "precision", "recall", "coverage"):
        values = [row[key] for row in families.values() if row[key] is not None]
        if values:
            best[key] = min(values) if key in least else max(values)

    def cell(row: Mapping[str, Any], key: str, text: str, *, rank: bool = True) -> str:
        mark = ' class="best"' if rank and key in best and row[key] == best[key] else ""
        return f"<td{mark}>{text}</td>"

    lines = []
    rows = [("real", summary["real"]), *families.items(), ("noise", summary["noise"])]
    for name, row in rows:
        rank = name in families
        if rank:
            dot = f'<span class="dot" style="background:{COLOURS[name]}"></span>'
            label = f"{dot}{name_of(name, row['recipe'])}<small>{SAYING[name]}</small>"
        else:
            label = {
                "real": "Real pictures<small>to beat</small>",
                "noise": "Noise<small>must lose</small>",
            }[name]
        shade = "" if rank else ' class="yardstick"'
        passes = "–" if row["network_passes"] is None else f"{row['network_passes']:,}"
        size = "–" if row["parameters"] is None else f"{row['parameters'] / 1000:,.0f} k"
        lines.append(
            f"<tr{shade}><td>{label}</td>"
            f'<td class="text">{html.escape(row["density"] or "–")}</td>'
            + cell(row, "bits_per_dim", bits(row), rank=rank)
            + cell(row, "frechet", number(row["frechet"]), rank=rank)
            + cell(row, "precision", number(row["precision"]), rank=rank)
            + cell(row, "recall", number(row["recall"]), rank=rank)
            + cell(row, "coverage", number(row["coverage"]), rank=rank)
            + cell(row, "sample_seconds", seconds(row["sample_seconds"]), rank=rank)
            + f"<td>{passes}</td><td>{seconds(row['train_seconds'])}</td><td>{size}</td></tr>"
        )
    return (
        '<div class="wide"><table>\n<thead><tr><th>Family</th><th class="text">Density</th>'
        "<th>Bits/value<small>less is better</small></th><th>Fréchet<small>less is better</small></th>"
        "<th>Precision<small>looks real</small></th><th>Recall<small>shows all</small></th>"
        "<th>Classes<small>covered</small></th><th>100 samples<small>time</small></th>"
        "<th>Network<small>passes</small></th><th>Training<small>time</small></th><th>Size<small>parameters</small></th></tr></thead>\n<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody></table></div>\n"
        '<p class="note">Bold is the best of the families. “≤” marks a bound: the true cost of '
        "the discrete picture is at most that. A dash: there is no such number. The real pictures are the "
        "training split, the noise is uniform grey values.</p>"
    )


def _samples(families: Mapping[str, Any], sheets: Mapping[str, bytes]) -> str:
    cards = []
    for name in ("real", *families):
        if name == "real":
            text = "<b>Real</b>, from the held-out split"
        else:
            row = families[name]
            text = f"<b>{name_of(name, row['recipe'])}</b>, Fréchet {number(row['frechet'])}"
            if row["agreement"] is not None:
                text += f", {row['agreement']:.1%} read as the class asked for"
        alt = "Real pictures" if name == "real" else f"Samples of {TITLES[name]}"
        cards.append(
            f'<figure><img alt="{alt}" src="{_inline(sheets[name], "image/png")}">'
            f"<figcaption>{text}</figcaption></figure>"
        )
    return (
        "<h2>Samples</h2>\n<p>Not chosen: the first samples under the seed, in the order of their numbers; where the "
        "data has labels, one column for each class.</p>\n"
        '<div class="sheets">\n' + "\n".join(cards) + "\n</div>"
    )


def _crossing(crossing: bytes) -> str:
    return (
        "<h2>The crossing from Z to X</h2>\n"
        "<p>Each family carries a point Z of a simple distribution, left, to a picture X, right. The GAN and the VAE "
        "jump once; the flow moves through invertible layers; diffusion takes away noise step by step; the "
        "autoregressive model decides one pixel after the other, given all before it.</p>\n"
        '<figure class="full"><img alt="Stages from Z to X for each family" '
        f'src="{_inline(crossing, "image/png")}"><figcaption>Three samples of each family. What is '
        "not a picture yet is scaled to the grey range; a prior point that is a vector is folded into a square."
        "</figcaption></figure>"
    )


def _passes(summary: Mapping[str, Any], passes_svg: bytes) -> str:
    curve = summary["steps_curve"]
    text = "<p>Each mark is a family at its own setting. One-pass families have nothing to trade. "
    if curve:
        text += (
            "The line is a single trained diffusion model, sampled with "
            f"{', '.join(str(point['steps']) for point in curve)} steps: the number of passes is free. "
        )
    if "autoregressive" in summary["families"]:
        passes = summary["families"]["autoregressive"]["network_passes"]
        text += f"The autoregressive model cannot skip: {passes} passes, one for each value it draws."
    text = text.strip() + "</p>"
    return (
        f"<h2>Quality against passes</h2>\n{text}\n"
        f'<figure class="full"><img alt="Frechet distance against network passes and seconds" '
        f'src="{_inline(passes_svg, "image/svg+xml")}">'
        "<figcaption>Fréchet distances as in the table: those of the real training pictures and of noise are the two "
        "lines across.</figcaption></figure>"
    )


def _method(summary: Mapping[str, Any]) -> str:
    data, classifier = summary["data"], summary["classifier"]
    levels = data["levels"]
    judged = (
        f"a small convolutional classifier trained on the real training pictures (it labels "
        f"{classifier['accuracy']:.1%} of the held-out ones correctly)"
        if classifier["accuracy"] is not None
        else "a small convolutional network trained to tell how far the real training pictures were turned"
    )
    own = " and with its label" if data["classes"] is not None else ""
    of = (
        "training picture"
        if data["judged"] == data["train"]
        else f"of {data['judged']:,} evenly spaced training pictures"
    )
    drawn = f"one for each {of}{own}"
    weak = (
        f" Here it had only {classifier['classes']} classes to tell apart, and so little reason to look at what else "
        "makes a picture real: precision is weak evidence then, and pictures that are far from real may pass."
        if classifier["classes"] < FEW_CLASSES
        else ""
    )
    covered = (
        "<i>Classes covered</i> is the share of the classes that the classifier finds in the samples at least half as "
        "often as they are among the real pictures."
        if data["classes"] is not None
        else "The data has no labels, so there are no classes to cover."
    )
    taken = [row["train_seconds"] for row in summary["families"].values()]
    spent = "" if len(taken) < 2 else f", which here took {seconds(min(taken))} to {seconds(max(taken))}"
    threads = summary["machine"]["threads"]
    computed = (
        "Pictures this small are computed on one thread: networks of this size lose more to waking a second thread "
        "than they gain by it, and the numbers do not depend on the number of cores then."
        if data["dimensions"] < SMALL
        else f"PyTorch computed on {threads} thread{'' if threads == 1 else 's'}."
    )
    guess = number(summary["noise"]["bits_per_dim"])
    return f"""<h2>How it was measured</h2>
<p><b>Split.</b> {data["train"]:,} pictures to train on and {data["test"]:,} held out: the same for every family and
every seed. Each family trains for a fixed number of steps{spent}. Samples and densities are those of the moving
average of the weights.</p>
<p><b>Densities made comparable.</b> The pictures are discrete: {levels} grey values. The autoregressive model gives
the probability of such a picture, and the VAE and the diffusion model bound it. A flow has a density of continuous
values, which on discrete data could be made as great as one likes. So each grey value gets uniform noise over its own
cell, and the density there, times the volume of the cell, averages to a lower bound on the logarithm of the picture’s
probability (uniform dequantization; Theis, van den Oord and Bethge 2016, arXiv:1511.01844). All numbers are then bits
per value of the same discrete pictures: −log₂ p(x), divided by {data["dimensions"]:,} values. Guessing every value
costs log₂ {levels} = {guess} bits, the price of the noise row. The column “density” says what a family has of its own:
“exact” is a density that it can compute, “lower bound” one that it can only bound. The bits are exact only where the
family gives the probability of the discrete picture itself; where it bounds that, or is dequantized as the flow is,
the true bits are at most those shown, which “≤” marks. A GAN has only samples.</p>
<p><b>Sample quality.</b> {judged[0].upper() + judged[1:]} turns each picture into {classifier["features"]} features,
few enough that {data["test"]:,} held-out pictures can carry a covariance.{weak} Every set that is judged has
{data["judged"]:,} pictures, {drawn}, rounded to the same {levels} grey values; it is held against the held-out split.
The row of real pictures is these training pictures themselves. It is above zero because the sets are finite, and
because the classifier was trained on those very pictures and reads them otherwise than new ones: it is a yardstick,
and not the best that a model could reach. <i>Fréchet distance</i> (Heusel et al. 2017) compares mean and covariance;
100 is the total variance of the real features. <i>Precision</i> is the share of samples that lie among real pictures,
<i>recall</i> the share of real pictures that lie among the samples, by the third nearest neighbour (Kynkäänniemi et
al. 2019). {covered}</p>
<p><b>Cost.</b> The median time of a batch of 100 samples, and the passes of the network that this takes; the time of
the training loop. {computed} The times belong to the machine below.</p>"""


def _machine(summary: Mapping[str, Any]) -> str:
    entries = {**summary["machine"], "seed": summary["seed"], "budget": summary["budget"]}
    entries["versions"] = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    entries["took"] = f"{summary['seconds'] / 60:.1f} minutes in all"
    items = "\n".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in entries.items())
    keys = list(dict.fromkeys(key for recipe in summary["recipes"].values() for key in recipe))
    head = "".join(f"<th>{html.escape(key.replace('_', ' '))}</th>" for key in keys)
    body = "\n".join(
        f"<tr><td>{name_of(family, summary['families'][family]['recipe'])}</td>"
        + "".join(f"<td>{html.escape(_plain(recipe.get(key)))}</td>" for key in keys)
        + "</tr>"
        for family, recipe in summary["recipes"].items()
    )
    return (
        f"<h2>The run</h2>\n<dl>\n{items}\n</dl>\n"
        f'<div class="wide"><table><thead><tr><th>Recipe</th>{head}</tr></thead>\n<tbody>\n'
        f"{body}\n</tbody></table></div>\n"
        '<p class="note">The same seed on the same machine gives the same numbers, times apart. '
        "<code>summary.json</code>, beside this page, holds all of them.</p>"
    )


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(_plain(v) for v in value) if isinstance(value, (list, tuple)) else str(value)


def _inline(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
