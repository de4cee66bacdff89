"""Plot the effect of rotations on activations, weights and perplexity as PNG files, one function per plot.

Figures do not use pyplot's global state, so that a library call never disturbs the figures of the caller. matplotlib is
an optional extra and is imported only when something is drawn.
"""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinquant.errors import SpinquantError

# Okabe and Ito's colors: distinguishable with color blindness, and by brightness in print.
PLAIN, ROTATED, REFERENCE = "#D55E00", "#0072B2", "#444444"
GAUSSIAN_KURTOSIS = 3.0
WIDTH = 9.0  # inches
MAX_TOKENS, MAX_CHANNELS = 48, 144  # resolution of a surface plot of this width that shows every peak
TINY = 1e-30  # lower limit of a root mean square, so that rows of zeros stay zero


class PlotError(SpinquantError):
    """A plot cannot be drawn."""


def require_matplotlib() -> None:
    """Raise PlotError if matplotlib is not installed; called before long runs."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PlotError("plots need matplotlib: pip install 'spinquant[plot]'") from None


def plot_activations(before: Tensor, after: Tensor, path: Path, *, title: str) -> None:
    """Plot the magnitudes of one activation, (tokens, channels), before and after rotation, as surfaces on one scale.

    Every token is divided by its root mean square, since the range of a per-token quantizer depends on that ratio.
    """
    figure = _figure(WIDTH, 4.1, layout=None)  # automatic layouts leave 3-D axes half of the space
    figure.text(0.5, 0.955, f"{title}: magnitude / RMS of its token", ha="center", va="center", fontsize=12)
    surfaces = [downsample_max(relative_magnitude(x), MAX_TOKENS, MAX_CHANNELS) for x in (before, after)]
    top = max(surface.max().item() for surface in surfaces)
    for i, (surface, name) in enumerate(zip(surfaces, ("plain", "rotated"), strict=True)):
        axes = figure.add_axes((0.01 + 0.5 * i, 0.06, 0.44, 0.84), projection="3d")
        axes.patch.set_visible(False)
        _draw_surface(axes, surface, before.shape, top)
        figure.text(0.25 + 0.5 * i, 0.875, f"{name}: highest {surface.max().item():.1f}", ha="center", fontsize=11)
    _save(figure, path)


def _draw_surface(axes: Any, surface: Tensor, shape: Sequence[int], top: float) -> None:
    tokens = torch.linspace(0, shape[0] - 1, surface.shape[0])
    channels = torch.linspace(0, shape[1] - 1, surface.shape[1])
    y, x = torch.meshgrid(tokens, channels, indexing="ij")
    axes.plot_surface(
        *(t.numpy() for t in (x, y, surface)),
        cmap="viridis",
        vmin=0,
        vmax=0.6 * top,  # faces take the mean of their corners, so a lone peak would look dark
        rcount=surface.shape[0],
        ccount=surface.shape[1],
        linewidth=0,
        antialiased=False,
    )
    axes.set(xlabel="channel", ylabel="token", zlim=(0, top))
    axes.locator_params(axis="x", nbins=4)
    axes.locator_params(axis="y", nbins=3)
    axes.locator_params(axis="z", nbins=5)
    axes.view_init(elev=22, azim=-60)
    axes.set_box_aspect((1.5, 1.1, 1.0), zoom=1.06)


def plot_kurtosis(
    before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]], path: Path, *, title: str
) -> None:
    """Plot the kurtosis of linears' inputs by layer, one panel per kind of linear, on a common logarithmic axis."""
    figure = _figure(WIDTH, 3.4)
    figure.suptitle(title)
    panels = figure.subplots(1, len(before), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, before, strict=True):
        for values, colour, label, marker in (
            (before[kind], PLAIN, "plain", "o"),
            (after[kind], ROTATED, "rotated", "s"),
        ):
            axes.plot(range(len(values)), values, color=colour, label=label, marker=marker, markersize=3.5)
        axes.axhline(GAUSSIAN_KURTOSIS, color=REFERENCE, linestyle="--", linewidth=1, label="bell curve")
        axes.set(title=f"input of {kind}", xlabel="layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y", alpha=0.3)
        _log_axis(axes)
    panels[0].set_ylabel("kurtosis (log)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    _save(figure, path)


def plot_weights(
    before: Tensor,
    after: Tensor,
    path: Path,
    *,
    title: str,
    bits: int | None = None,
    grids: tuple[float, float] | None = None,
) -> None:
    """Plot histograms of one linear's weights, each row divided by its root mean square; counts on a log axis.

    grids: half-widths of the `bits`-bit quantization grid before and after rotation, in the same unit.
    """
    figure = _figure(WIDTH, 3.6)
    figure.suptitle(title)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    rows = [x.float() / x.float().square().mean(dim=-1, keepdim=True).sqrt().clamp(min=TINY) for x in (before, after)]
    edge = max(x.abs().max().item() for x in rows)
    for i, (axes, x, colour, name) in enumerate(zip(panels, rows, (PLAIN, ROTATED), ("plain", "rotated"), strict=True)):
        axes.hist(x.flatten().numpy(), bins=120, range=(-edge, edge), color=colour, log=True)
        axes.set_title(f"{name}: largest {x.abs().max().item():.1f}")
        axes.set_xlabel("weight / RMS of its row")
        if grids is not None:
            axes.axvspan(-grids[i], grids[i], color=REFERENCE, alpha=0.13, linewidth=0, zorder=0)
            label = f"{bits}-bit grid\nup to {grids[i]:.1f}"
            axes.annotate(label, (0, 0.97), xycoords=("data", "axes fraction"), ha="center", va="top", fontsize=9)
    panels[0].set_ylabel("number of weights (log)")
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(low, high * 12)  # room for the label of the grid
    _save(figure, path)


def plot_perplexities(rows: Sequence[tuple[str, float, float]], reference: float, path: Path, *, title: str) -> None:
    """Plot (label, plain, rotated) perplexities as bars on a log axis, with a line at that of the original model.

    A perplexity that is not finite is a hatched bar of full height.
    """
    figure = _figure(WIDTH, 4.0)
    axes = figure.subplots()
    axes.set_title(title)
    finite = [value for row in rows for value in (*row[1:], reference) if isfinite(value)] or [1.0]
    bottom, top = min(finite) / 1.6, max(finite) * 1.5
    for offset, colour, label, column in ((-0.2, PLAIN, "plain", 1), (0.2, ROTATED, "rotated", 2)):
        values = [float(row[column]) for row in rows]
        heights = [(value if isfinite(value) else top) - bottom for value in values]
        places = [i + offset for i in range(len(rows))]
        bars = axes.bar(places, heights, width=0.38, bottom=bottom, color=colour, label=label)
        for bar, value in zip(bars, values, strict=True):
            bar.set_hatch("" if isfinite(value) else "//")
        axes.bar_label(bars, [number(value) for value in values], padding=2)
    axes.axhline(reference, color=REFERENCE, linestyle="--", linewidth=1.2, label=f"not quantized: {number(reference)}")
    axes.set(ylabel="perplexity (log), lower is better")
    _log_axis(axes)
    axes.set_ylim(bottom, top * 1.6)
    axes.set_xticks(range(len(rows)), [row[0] for row in rows])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", frameon=False)
    _save(figure, path)


def plot_learning_curve(local: Mapping[str, tuple[str, Sequence[float]]], through: Sequence[float], path: Path) -> None:
    """Plot the losses of all steps, one panel for local learning and one for end-to-end, as far as there are any.

    local: by space, the name of its rotation and its losses; drawn as a moving average over about a tenth of the steps,
    relative to its first value.
    """
    figure = _figure(WIDTH, 3.4)
    places = figure.subplots(1, bool(local) + bool(through), squeeze=False)[0]
    if local:
        colours: dict[str, str] = {"R1": ROTATED, "R2": PLAIN, "R3": REFERENCE}
        for rotation, losses in local.values():
            steps, means = _smooth(losses)
            wide = 2 if rotation == "R1" else 0.6
            places[0].plot(
                steps, [mean / means[0] for mean in means], color=colours.get(rotation, "0.6"), linewidth=wide
            )
        for rotation in sorted({rotation for rotation, _ in local.values()}):
            places[0].plot([], [], color=colours.get(rotation, "0.6"), label=rotation)
        width = max(1, max(len(losses) for _, losses in local.values()) // 10)
        label = "loss over its first" + (f", means of {width} steps" if width > 1 else "")
        places[0].set(xlabel="step", ylabel=label, title="local learning, by rotation")
    if through:
        steps, means = _smooth(through)
        axes = places[-1]
        axes.plot(range(1, len(through) + 1), through, "o", color=ROTATED, markersize=2, alpha=0.5, label="a step")
        if len(means) < len(through):
            label = f"mean of {len(through) - len(means) + 1}"
            axes.plot(steps, means, color=ROTATED, linewidth=2, label=label)
        axes.set(xlabel="step", ylabel="loss, nats per token", title="learning end to end")
    for axes in places:
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    _save(figure, path)


def _smooth(losses: Sequence[float]) -> tuple[list[int], list[float]]:
    """Moving averages over about a tenth of the steps, and the last step of each."""
    window = max(1, len(losses) // 10)
    means = torch.tensor(losses, dtype=torch.float64).unfold(0, window, 1).mean(-1)
    return list(range(window, len(losses) + 1)), means.tolist()


def plot_rounding_errors(before: Mapping[str, float], after: Mapping[str, float], path: Path) -> None:
    """Plot the relative rounding error ||Q(z) - z||^2 / ||z||^2 of every quantizer: inputs of linears, keys, values."""
    figure = _figure(WIDTH, 3.8)
    axes = figure.subplots()
    for errors, colour, label in ((before, PLAIN, "random"), (after, ROTATED, "learned")):
        axes.plot(range(len(errors)), list(errors.values()), ".", color=colour, markersize=5, label=label)
    axes.set_yscale("log")
    axes.set(
        xlabel="quantizer: inputs of linears by layer, then keys and values",
        ylabel="relative error (log)",
        title="error of rounding",
    )
    axes.set_ylim(bottom=0.8 * min([*before.values(), *after.values()]))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _save(figure, path)


def relative_magnitude(x: Tensor) -> Tensor:
    """|x| over the root mean square of its token: float32, same shape; a token of zeros stays zero."""
    x = x.float()
    return x.abs() / x.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=TINY)


def downsample_max(x: Tensor, rows: int, columns: int) -> Tensor:
    """Downsample to at most (rows, columns) by maximum pooling, which preserves peaks."""
    limits = (min(rows, x.shape[0]), min(columns, x.shape[1]))
    return torch.nn.functional.adaptive_max_pool2d(x[None], limits)[0]


def number(value: float) -> str:
    """Format a number with three digits, more if it is large: 2.90, 15.5, 108, 3,520; words if it is not finite."""
    if not isfinite(value):
        return "not a number" if value != value else "infinite"
    if abs(value) >= 1e6:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def _figure(width: float, height: float, *, layout: str | None = "constrained") -> Any:
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout, facecolor="white")  # pyright: ignore[reportArgumentType]
    FigureCanvasAgg(figure)
    return figure


def _log_axis(axes: Any) -> None:
    # 10, 30, 100 instead of powers of ten, and labels even where the axis covers less than a decade.
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    steps = (1.0, 3.0) if high / low > 20 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150, metadata={"Software": None})
