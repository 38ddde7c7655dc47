"""How every figure looks: one palette, one type size, panels placed in inches; matplotlib through its objects only."""

from __future__ import annotations

import base64
import io
import math
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, FuncNorm, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

if TYPE_CHECKING:
    from plait.train.report.run import Group

INK, MUTED, FAINT, PAPER = "#1c2733", "#66727f", "#e4e8ec", "#ffffff"
RUN_COLOURS = ("#0077bb", "#ee7733", "#009988", "#cc3311", "#aa3377", "#33a6d8", "#777777")  # Tol, vibrant: colour-blind safe
KIND_COLOURS = {  # Tol, high contrast and two more
    "full": "#004488",
    "window": "#6699cc",
    "sparse": "#bb5566",
    "linear": "#c2902a",
    "parallel": "#3a8f6d",
}
KIND_DASHES = {"full": "-", "window": (0, (8, 1.5)), "sparse": (0, (6, 2)), "parallel": (0, (6, 1.5, 1, 1.5))}
STATE_DASH = (0, (2, 1.5))
ROUND = (1, 2, 2.5, 5, 10)  # the steps between axis numbers
WIDTH, DPI = 11.2, 150  # inches; shown 1075 CSS pixels wide


def _even(name: str, low: float = 0.0, high: float = 1.0) -> Colormap:
    """The part low..high of a colour map, resampled so that its lightness (CIE L*) falls or rises evenly."""
    colours = matplotlib.colormaps[name](np.linspace(low, high, 512))[:, :3]
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    lightness = np.cbrt(linear @ (0.2126, 0.7152, 0.0722))
    order = np.argsort(lightness)
    even = np.interp(np.linspace(lightness[0], lightness[-1], 256), lightness[order], order)
    return LinearSegmentedColormap.from_list(name, colours[even.astype(int)])


AMOUNT_MAP = _even("BuPu")  # pale: little, dark: much
DEPTH_MAP = _even("viridis_r", 0.4, 1.0)  # light: first layer, dark: last; its light end stands out from white as 3 to 1
SIGNED_MAP = matplotlib.colormaps["RdBu"]  # red: negative, white: 0, blue: positive
SIGNED_ROOT = FuncNorm((lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda y: np.sign(y) * np.square(y)), vmin=-1, vmax=1)

_INSTALLED = set(font_manager.get_font_names())
RC: dict[str, Any] = {
    "font.family": [
        name for name in ("Inter", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans") if name in _INSTALLED
    ],
    "font.size": 8.5,
    "text.parse_math": False,  # a token or a run name may hold a dollar sign
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.titley": 1.0,  # beside a colour bar, not pushed above it
    "axes.edgecolor": "#b9c2cb",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": "#b9c2cb",
    "ytick.color": "#b9c2cb",
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
}


@dataclass(frozen=True)
class Picture:
    """A finished figure: its file name without ending, its PNG, the caption (plain text) and its width in inches."""

    name: str
    png: bytes
    caption: str
    width: float

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, as the PNG's first chunk has them: with these a page keeps its places before pictures are there."""
        return int.from_bytes(self.png[16:20], "big"), int.from_bytes(self.png[20:24], "big")

    @property
    def source(self) -> str:
        """The image as a data URL."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


def panels(
    count: int, *, columns: int, height: float, left: float = 0.62, gap: tuple[float, float] = (0.62, 0.62), margin=(0.42, 0.5)
) -> tuple[Figure, list[Axes]]:
    """A full-width figure with `count` equal panels, row by row; every length in inches.

    Args:
      count: how many panels.
      columns: panels in a row.
      height: of one panel.
      left: margin that holds the labels of the first column.
      gap: between columns and between rows.
      margin: above the first row and below the last.
    """
    rows = math.ceil(count / columns)
    top, bottom = margin
    width = (WIDTH - left - 0.12 - gap[0] * (columns - 1)) / columns
    total = top + bottom + rows * height + gap[1] * (rows - 1)
    figure = Figure(figsize=(WIDTH, total))
    FigureCanvasAgg(figure)
    axes = []
    for index in range(count):
        row, column = divmod(index, columns)
        x, y = left + column * (width + gap[0]), total - top - (row + 1) * height - row * gap[1]
        axes.append(figure.add_axes((x / WIDTH, y / total, width / WIDTH, height / total)))
    return figure, axes


def legend_above(figure: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Adds a legend in rows of their own, above all panels."""
    wide = max((0.065 * len(label) + 0.55 for label in labels), default=1.0)  # inches
    columns = max(1, min(len(labels), int((WIDTH - 0.3) / wide)))
    width, height = figure.get_size_inches()
    more = 0.22 * math.ceil(len(labels) / columns) + 0.06
    figure.set_size_inches(width, height + more)
    for ax in figure.axes:
        place = ax.get_position()
        share = height / (height + more)
        ax.set_position((place.x0, place.y0 * share, place.width, place.height * share))
    top = 1 - 0.04 / (height + more)
    figure.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(0.3 / width, top), ncols=columns, handlelength=1.8, borderaxespad=0
    )


def picture(name: str, figure: Figure, caption: str) -> Picture:
    """The figure rendered to PNG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a token may hold a character that the font lacks
        figure.savefig(buffer, format="png", dpi=DPI)
    return Picture(name, buffer.getvalue(), caption, figure.get_figwidth())


def short(value: float, _: object = None) -> str:
    """An axis number: 0.001, 20, 1.5k, 2M."""
    for scale, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:g}{letter}"
    return f"{value:g}"


def value_axis(ax: Axes, *, log: bool = False) -> None:
    """Horizontal grid lines and plain numbers on the y axis."""
    ax.grid(axis="y")
    if log:
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        decades = math.log10(high / low) if low > 0 else 3
        subs = (1.0,) if decades > 2.5 else (1.0, 2.0, 5.0) if decades > 0.7 else tuple(range(1, 10))
        ax.yaxis.set_major_locator(LogLocator(subs=subs) if decades > 0.3 else MaxNLocator(5, steps=ROUND))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
    ax.yaxis.set_major_formatter(FuncFormatter(short))


def step_axis(ax: Axes, label: str = "step") -> None:
    """Few round step numbers on the x axis."""
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=ROUND))
    ax.xaxis.set_major_formatter(FuncFormatter(short))
    ax.set_xlabel(label)


def colour_bar(
    ax: Axes, mappable: ScalarMappable, *, ticks: Sequence[float] | None = None, width: float = 0.34, lift: float = 0.07
) -> Axes:
    """A thin horizontal scale `lift` inches above the right end of a panel, beside its title."""
    inches = ax.get_position().height * ax.figure.get_figheight()
    bar = ax.inset_axes((1 - width, 1 + lift / inches, width, 0.07 / inches))
    scale = ax.figure.colorbar(mappable, cax=bar, orientation="horizontal", ticks=ticks)
    scale.outline.set_visible(False)
    bar.xaxis.set_ticks_position("top")
    bar.xaxis.set_minor_locator(NullLocator())
    if ticks is None:
        bar.xaxis.set_major_locator(MaxNLocator(2))
    bar.xaxis.set_major_formatter(FuncFormatter(short))
    bar.tick_params(labelsize=7, pad=1, length=0)
    return bar


def title(ax: Axes, text: str, *, size: float = 9.5, beside: float = 0.0) -> None:
    """The title of a panel, on two lines and smaller as need be to stay left of what takes the right share `beside` of its width."""
    room = (1 - beside) * ax.get_position().width * ax.figure.get_figwidth() - 0.08 * (beside > 0)
    across = max(1, int(room / (0.0086 * size)))  # letters of bold type in a line
    lines = textwrap.wrap(text, max(across, math.ceil(0.55 * len(text)))) or [""]
    size *= min(1.0, across / max(map(len, lines)))
    ax.set_title("\n".join(lines), fontsize=max(size, 6.5), linespacing=1.1)


def head_of(ax: Axes, name: str, colour: str) -> None:
    """The name of a run over the title of its panel, smaller as need be."""
    width, height = ax.get_position().width * ax.figure.get_figwidth(), ax.get_position().height * ax.figure.get_figheight()
    size = min(9.5, width / (0.0086 * max(1, len(name))))
    ax.text(0, 1 + 0.44 / height, name, transform=ax.transAxes, color=colour, weight="bold", fontsize=size)


def kind_strip(ax: Axes, spans: Sequence[tuple[float, float, str]]) -> None:
    """A strip left of a heat map that colours the rows start..end by layer kind; the row labels move beside it."""
    inch = 1 / (ax.get_position().width * ax.figure.get_figwidth())
    place = {"transform": ax.get_yaxis_transform(), "clip_on": False, "linewidth": 0}
    for start, end, kind in spans:
        ax.add_patch(Rectangle((-0.11 * inch, start), 0.07 * inch, end - start, color=kind_colour(kind), **place))
    ax.tick_params(axis="y", pad=10, length=0)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)


def blank(ax: Axes, sentence: str) -> None:
    """A panel that says why it is empty."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, sentence, ha="center", va="center", color=MUTED, transform=ax.transAxes, wrap=True)


def run_colour(index: int) -> str:
    """The colour of a run, the same in every figure."""
    return RUN_COLOURS[index % len(RUN_COLOURS)]


def run_dash(index: int) -> Any:
    """The line style of a run; another one each time the colours start again."""
    return ("-", (0, (5, 2)), (0, (1.5, 1.5)))[index // len(RUN_COLOURS) % 3]


def kind_colour(kind: str) -> str:
    """The colour of a layer kind, the same in every figure."""
    return KIND_COLOURS.get(kind, MUTED)


def group_dash(group: Group) -> Any:
    """The line style of heads of one kind: dotted where they read a state."""
    return STATE_DASH if group.state else KIND_DASHES.get(group.kind, "-")


def depth_colours(count: int) -> tuple[list[Any], ScalarMappable]:
    """A colour for each of `count` layers, pale to dark with depth, and what its colour bar needs."""
    mappable = ScalarMappable(Normalize(0, max(count - 1, 1)), DEPTH_MAP)
    return [mappable.to_rgba(index) for index in range(count)], mappable
