"""Report of the demo: its measurements as a dataclass, and as one self-contained HTML page.

Every statement on the page is computed from the measurements, including that rotation did not help. Plots and styles
are embedded, so the file has no external dependencies.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from statistics import NormalDist
from typing import Any

from spinquant.evaluation.equivalence import Deviation
from spinquant.evaluation.plots import GAUSSIAN_KURTOSIS, number
from spinquant.rotation_names import MERGEABLE

Pair = tuple[float, float]  # plain, rotated

NOTICEABLE = 0.01  # nats per token; the page calls a smaller difference none
OUTLIER = 2.0  # an outlier is a peak more than this many times that of a normal distribution

PLACES = {
    "R1": "the residual stream, fused into the weights",
    "R2": "the values of every attention head, fused into the weights",
    "R3": "queries and keys after RoPE, at run time",
    "R4": "the input of the last linear of every MLP, at run time",
}


@dataclass(frozen=True)
class Activation:
    """Statistics of the input of some linears, plain and rotated.

    peak: largest magnitude of a token over the token's root mean square, median over tokens. zeros: fraction of all
    numbers that the scheme's activation quantizer rounds to zero, None without one.
    """

    readers: str
    channels: int
    peak: Pair
    zeros: Pair | None


@dataclass(frozen=True)
class DemoResult:
    """Measurements of the demo.

    rows: (label, perplexity of the plain model, of the rotated one); the first row is at 16 bits, the last is the
        whole scheme.
    twin, real: how far rotating moved the logits of a tiny float64 model, and of this one on real tokens.
    rotations: the construction of each, by name.
    kurtosis: plain and rotated, per layer, by kind of linear: over the channels of a token, mean over tokens.
    weight_kurtosis: over the entries of a row, mean over all linears.
    layer, activations, weight: shown in the plots.
    """

    model: str
    dtype: str
    arithmetic: Mapping[str, str]
    text: str
    windows: int
    length: int
    seed: int
    scheme: str
    rotations: Mapping[str, str]
    rows: tuple[tuple[str, float, float], ...]
    twin: Deviation
    real: Deviation
    layer: int
    activations: tuple[Activation, ...]
    kurtosis: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    weight: str
    weight_kurtosis: Pair
    pictures: tuple[str, ...]
    seconds: float
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict, ready for JSON; perplexities that are not finite become None."""
        rows = [(label, *(v if math.isfinite(v) else None for v in values)) for label, *values in self.rows]
        return {**asdict(self), "rows": rows}


SURFACES = (
    "<p>The surfaces show the magnitudes of a linear's input by token and channel, both on the same scale, and every "
    "token relative to its root mean square. Where neighbours are merged, the largest is drawn. The layer is the one "
    "with the most peaked inputs; the kurtosis plot below covers all layers.</p>"
)


def page(result: DemoResult, images: Mapping[str, bytes]) -> str:
    """Render the HTML page; images are PNG files by the names in `result.pictures`."""
    first, last, kurtosis, histogram, bars = (_image(images[name]) for name in result.pictures)
    a, b = result.activations
    sections = (
        _opening(result),
        f"<h2>Problem: outliers</h2>{_problem(result)}",
        f"<h2>Method: rotate first</h2>{_idea(result)}",
        f"<h2>Check: rotation alone changes nothing</h2>{_proof(result)}",
        f"<h2>Result: perplexity</h2>{_table(result)}",
        _figure(bars, "The same perplexities as bars, on a logarithmic scale."),
        f"<h2>Activations and weights before and after</h2>{SURFACES}",
        _figure(first, _surface_caption(result, a)),
        _figure(last, _surface_caption(result, b)),
        _figure(kurtosis, _kurtosis_caption(result)),
        _figure(histogram, _weight_caption(result)),
        f"<h2>Next steps</h2>{_commands(result)}",
        _closing(result),
    )
    title = escape(f"spinquant: {result.model}, {result.scheme}")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def outcome(plain: float, rotated: float, reference: float) -> str:
    """Effect of rotation in words, from three perplexities; the damage is a loss in nats per token."""
    if not math.isfinite(reference):
        return "the 16-bit model itself fails"
    if not math.isfinite(rotated):
        return "fails plain and rotated" if not math.isfinite(plain) else "rotating made it worse"
    if not math.isfinite(plain):
        return "works only when rotated"
    damage, left = math.log(plain / reference), math.log(rotated / reference)
    if left - damage > NOTICEABLE:
        return "rotating made it worse"
    if damage - left <= NOTICEABLE:
        return "rotating made no difference"
    if damage <= NOTICEABLE:
        return "no damage"
    return "all removed" if left <= NOTICEABLE else f"{1 - left / damage:.0%} removed"


def times(value: float, reference: float) -> str:
    """The ratio of two perplexities in words, such as "1.08 times as high"."""
    ratio = value / reference
    if not math.isfinite(ratio):
        return "not finite"
    return f"{ratio:.2f} times as high" if ratio < 10 else f"{number(ratio)} times as high"


def _opening(result: DemoResult) -> str:
    reference = result.rows[0][1]
    label, plain, rotated = result.rows[-1]
    verdict = f"{outcome(plain, rotated, reference).capitalize()}."
    if math.isfinite(plain) and math.isfinite(rotated) and math.log(plain / rotated) > NOTICEABLE:
        verdict = f"The rotation divides the perplexity by {number(plain / rotated)}."
    return (
        f"<h1>{escape(result.model)} at {escape(label)}, plain and rotated</h1>"
        f'<p class="lead">The 16-bit model has a perplexity of {number(reference)}. Quantized without rotations: '
        f"{number(plain)} ({times(plain, reference)}). Rotated first and quantized in the same way: "
        f"{number(rotated)} ({times(rotated, reference)}). <strong>{verdict}</strong></p>"
    )


def _problem(result: DemoResult) -> str:
    items = []
    for a in result.activations:
        text = (
            f"Input of {escape(a.readers)}: the largest number of a typical token is {number(a.peak[0])} times the "
            f"token's root mean square. For {a.channels} normally distributed numbers it would be "
            f"{number(_normal_peak(a))} times."
        )
        if a.zeros is not None:
            text += f" The quantizer rounds {a.zeros[0]:.0%} of these numbers to zero."
        items.append(f"<li>{text}</li>")
    outliers = [a.peak[0] > OUTLIER * _normal_peak(a) for a in result.activations]
    none = "" if any(outliers) else "<p>So this model has no significant outliers.</p>"
    return (
        "<p>All numbers of a token are rounded to one grid of few points, which spans the range from the smallest to "
        "the largest. If some channels are far larger than all others, as is common in language models, they widen "
        "the steps of the grid, and most other numbers are rounded to a few points in the middle.</p>"
        f"<p>In layer {result.layer}, the one with the most peaked inputs:</p><ul>{''.join(items)}</ul>{none}"
    )


def _idea(result: DemoResult) -> str:
    items = "".join(
        f"<li><strong>{name}</strong> rotates {PLACES[name]} <small>({escape(made)})</small></li>"
        for name, made in result.rotations.items()
    )
    return (
        "<p>For an orthogonal matrix R, x W<sup>T</sup> = (x R)(W R)<sup>T</sup>: if the input of a linear and its "
        "weight are rotated by the same R, the output is unchanged. Every number of x R mixes all channels, so an "
        "outlier is spread over all of them. A rotation costs nothing at run time if it can be fused into the weights "
        f"that compute x.</p><ul>{items}</ul>"
    )


def _proof(result: DemoResult) -> str:
    _, plain, rotated = result.rows[0]
    return (
        "<p>Before quantization, the rotated model must compute the same as the original. "
        f"In a tiny random model of the same architecture, in float64, the logits moved by {result.twin.max_abs:.1e} "
        f"at most. In this model, in {escape(result.dtype)} on real text, they moved by {result.real.max_abs:.1e} at "
        f"most and {result.real.mean_abs:.1e} on average (relative error {result.real.relative:.1e}). "
        f"Its perplexity is {plain:.4f} plain and {rotated:.4f} rotated.</p>"
    )


def _table(result: DemoResult) -> str:
    reference = result.rows[0][1]
    lines = []
    for i, (label, plain, rotated) in enumerate(result.rows):
        cells = (number(plain), number(rotated), outcome(plain, rotated, reference) if i else "")
        lines.append(f"<tr><th>{escape(label)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return (
        f"<p>Perplexity on {result.windows} windows of {result.length} tokens of text ({escape(result.text)}); lower "
        "is better. W stands for weights, A for activations, KV for the KV cache, each with its bits. Weights are "
        "quantized by round-to-nearest (RTN). The last column is the share of the damage (the increase of the loss, in "
        "nats per token) that rotating removes.</p>"
        "<table><thead><tr><th>scheme</th><th>plain</th><th>rotated</th><th>damage</th></tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def _surface_caption(result: DemoResult, a: Activation) -> str:
    zeros = ""
    if a.zeros is not None:
        zeros = f" Rounded to zero: {a.zeros[0]:.0%} of the numbers plain, {a.zeros[1]:.0%} rotated."
    return (
        f"Input of {escape(a.readers)} in layer {result.layer}. Peak of a typical token: {number(a.peak[0])} plain, "
        f"{number(a.peak[1])} rotated, {number(_normal_peak(a))} for a normal distribution.{zeros}"
    )


def _kurtosis_caption(result: DemoResult) -> str:
    means = [
        f"{escape(kind)} {number(sum(plain) / len(plain))} plain, {number(sum(rotated) / len(rotated))} rotated"
        for kind, (plain, rotated) in result.kurtosis.items()
    ]
    heads = " The input of o is rotated within every head only." if "o" in result.kurtosis else ""
    return (
        "Kurtosis measures how far the largest numbers of a token stand out; "
        f"a normal distribution has {GAUSSIAN_KURTOSIS:.0f}. Mean over all layers: {'; '.join(means)}.{heads}"
    )


def _weight_caption(result: DemoResult) -> str:
    plain, rotated = result.weight_kurtosis
    return (
        f"Weights of the linear with the most peaked rows, {escape(result.weight)}; a shaded range is the grid of its "
        f"median row. Mean kurtosis over the rows of all linears: {number(plain)} plain, {number(rotated)} rotated."
    )


def _commands(result: DemoResult) -> str:
    names = ",".join(result.rotations)
    fused = ",".join(name for name in result.rotations if name in MERGEABLE)
    kind = " --type auto" if any("kronecker" in made for made in result.rotations.values()) else ""
    text = (
        "# MODEL: a folder or a model id on the hub. Show which tensors would be rotated, and how\n"
        f"spinquant plan MODEL{kind}\n\n"
        "# rotate, verify, quantize and save; then evaluate\n"
        f"spinquant quantize MODEL OUT --scheme {result.scheme} --rotations {names}{kind} --seed {result.seed}\n"
        "spinquant evaluate OUT --reference MODEL\n"
    )
    if fused:
        text += (
            "\n# write a plain 16-bit folder for other quantizers and runtimes, and compare its logits\n"
            f"spinquant rotate MODEL ROTATED --rotations {fused}{kind}\nspinquant verify MODEL ROTATED\n"
        )
    text += '\n# in Python\nimport spinquant\nmodel = spinquant.load("OUT")\n'
    return f"<pre>{escape(text, quote=False)}</pre>"


def _closing(result: DemoResult) -> str:
    versions = ", ".join(f"{name} {escape(found)}" for name, found in result.versions.items())
    return (
        f"<p><small>Measured in {result.seconds:.0f} seconds with seed {result.seed}: {versions}. "
        "All numbers are in demo.json beside this page. Methods: SpinQuant (arXiv 2405.16406), QuaRot (arXiv "
        "2404.00456).</small></p>"
    )


def _normal_peak(a: Activation) -> float:
    # Median of the largest of n independent standard normal magnitudes.
    return NormalDist().inv_cdf((1 + 0.5 ** (1 / a.channels)) / 2)


def _image(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _figure(source: str, caption: str) -> str:
    alt = caption.split(".")[0]
    return f'<figure><div><img src="{source}" alt="{alt}"></div><figcaption>{caption}</figcaption></figure>'


# Plots keep a white background in dark mode, and scroll sideways on narrow screens.
STYLE = """
:root { color-scheme: light dark; --ground: #fff; --text: #1b1b1f; --faint: #5c5f66; --line: #d8dbe0; --box: #f4f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #15171a; --text: #e6e7ea; --faint: #a0a5ad; --line: #363a41; --box: #1f2226; }
}
body { margin: 0; background: var(--ground); color: var(--text); font: 1.05rem/1.6 system-ui, sans-serif; }
main { max-width: 50rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 0.5rem; }
.lead { font-size: 1.15rem; }
sup { line-height: 0; font-size: 0.75em; }
small, figcaption { color: var(--faint); font-size: 0.9rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:last-child, th:last-child { text-align: left; }
tbody tr:last-child { font-weight: bold; }
figure { margin: 1.5rem 0 2rem; }
figure div { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; background: #fff; }
figure img { display: block; width: 100%; min-width: 32rem; }
figcaption { margin-top: 0.4rem; }
pre { background: var(--box); border: 1px solid var(--line); border-radius: 6px; padding: 0.8rem; overflow-x: auto; }
pre { font-size: 0.85rem; line-height: 1.5; }
"""
