"""Maps of what sets several runs apart: each head at the end, less the same head of the first run."""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import Normalize

from plait.train.probes.statistic import Statistic
from plait.train.report.panels.maps import layer_by_head
from plait.train.report.run import Run
from plait.train.report.style import SIGNED_MAP, Picture, colour_bar, head_of, panels, picture, run_colour, title
from plait.train.report.variants import whose


def of_heads(runs: Sequence[Run], shown: Sequence[Statistic]) -> Picture | str | None:
    """A map for each statistic of heads and run after the first; a sentence where no run has the layers and heads of the first, and
    None where no two have such a statistic."""
    first, *others = runs
    base_of = whose(first, runs)
    cells, alike = [], False
    for one in shown:
        base = first.by_head(one.name)
        if base is None or one.per != "head" or one.panel is None or not one.panel.compared:
            continue
        for index, run in enumerate(others, start=1):
            values = run.by_head(one.name)
            if values is None:
                continue
            alike = True
            if values.shape[1:] == base.shape[1:] and np.isfinite(change := values[-1] - base[-1]).any():
                cells.append((index, run, one, change))
    if not cells:
        return f"No run has as many layers and heads as {base_of}, so heads are not compared one by one." if alike else None
    largest = {one.name: 0.0 for _, _, one, _ in cells}
    for _, _, one, change in cells:
        largest[one.name] = max(largest[one.name], float(f"{np.nanmax(np.abs(change)):.2g}"))
    same = [one.panel.title for one in shown if largest.get(one.name) == 0 and one.panel]
    cells = [cell for cell in cells if largest[cell[2].name] > 0]
    if not cells:
        return f"Each head of each run ends as that of {base_of}."
    several = len({index for index, *_ in cells}) > 1
    columns = min(4, max(2, len(cells)))
    height = float(np.clip(0.16 * len(first.layers), 0.7, 4.0))
    figure, axes = panels(
        len(cells),
        columns=columns,
        height=height,
        left=0.5,
        gap=(0.42, 1.0 if several else 0.85),
        margin=(0.78 if several else 0.62, 0.42),
    )
    for position, (ax, (_, run, one, change)) in enumerate(zip(axes, cells)):
        end = largest[one.name]
        image = ax.imshow(change, aspect="auto", cmap=SIGNED_MAP, norm=Normalize(-end, end), interpolation="nearest")
        layer_by_head(ax, run, change, first=position % columns == 0, label="head")
        colour_bar(ax, image, ticks=[-end, 0, end])
        title(ax, one.panel.title, size=8.5, beside=0.34)
        if several:
            head_of(ax, whose(run, runs), run_colour(run.place))
    of = "its run" if several else whose(runs[cells[0][0]], runs)
    caption = f"Each head at the last probe step of {of}, less the same head of {base_of}: blue is more, red is less. "
    caption += "Rows are layers, columns heads; the ends of each scale are the largest difference of that statistic."
    if same:
        caption += f" The same in every head: {', '.join(same)}."
    return picture("differences", figure, caption)
