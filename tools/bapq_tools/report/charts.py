"""Charts as inline SVG: no script, colours from the page, readable without them by their titles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

__all__ = ["line_chart"]

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 18, 14, 46

Points = Sequence[tuple[float, float]]


def line_chart(
    series: Sequence[tuple[str, Points]],
    *,
    x_label: str,
    y_label: str,
    logarithmic: bool = False,
    steps: bool = False,
    marked: Sequence[tuple[str, float, float]] = (),
) -> str:
    """Lines over a shared x; `marked` points have a name beside them. Empty without a point.

    With `logarithmic` the y axis is one, and values that are not positive are left out.
    """
    kept = [
        (name, [(x, y) for x, y in points if y > 0 or not logarithmic]) for name, points in series
    ]
    everything = [point for _, points in kept for point in points]
    everything += [(x, y) for _, x, y in marked if y > 0 or not logarithmic]
    if not everything:
        return ""
    scale_y = math.log10 if logarithmic else float
    x_ticks = _ticks(min(x for x, _ in everything), max(x for x, _ in everything))
    ys = [scale_y(y) for _, y in everything]
    y_ticks = _decades(min(ys), max(ys)) if logarithmic else _ticks(min([*ys, 0.0]), max(ys))
    low_x, high_x = x_ticks[0], x_ticks[-1]
    low_y, high_y = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        right, down = (x - low_x) / (high_x - low_x), (scale_y(y) - low_y) / (high_y - low_y)
        return (
            _LEFT + right * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - down * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = [f"<title>{escape(f'{y_label} over {x_label}')}</title>"]
    for tick in y_ticks:
        down = place(low_x, 10**tick if logarithmic else tick)[1]
        text = f"1e{tick:.0f}" if logarithmic else f"{tick:g}"
        parts.append(f'<path class="grid" d="M{_LEFT} {down:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{text}</text>')
    some_y = 10**low_y if logarithmic else low_y
    for tick in x_ticks:
        right = place(tick, some_y)[0]
        height = _HEIGHT - _BOTTOM
        parts.append(
            f'<text x="{right:.1f}" y="{height + 18}" text-anchor="middle">{tick:g}</text>'
        )
    parts.append(
        f'<text x="{(_WIDTH + _LEFT) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    for number, (_, points) in enumerate(kept):
        corners = _corners([place(*point) for point in points], steps)
        parts.append(f'<polyline class="line s{number % 6}" points="{corners}"/>')
        if len(points) == 1:  # which makes no line
            right, down = place(*points[0])
            parts.append(
                f'<circle class="dot s{number % 6}" cx="{right:.1f}" cy="{down:.1f}" r="5"/>'
            )
    for name, x, y in marked:
        if y > 0 or not logarithmic:
            right, down = place(x, y)
            parts.append(f'<circle class="mark" cx="{right:.1f}" cy="{down:.1f}" r="4"/>')
            anchor = "end" if right > _WIDTH / 2 else "start"
            shift = -7 if anchor == "end" else 7
            parts.append(
                f'<text x="{right + shift:.1f}" y="{down - 7:.1f}" text-anchor="{anchor}">'
                f"{escape(name)}</text>"
            )
    names = "".join(
        f'<span class="key s{number % 6}">{escape(name)}</span>'
        for number, (name, _) in enumerate(kept)
        if name
    )
    return (
        f'<figure><figcaption>{escape(y_label)} {names}</figcaption><svg viewBox="0 0 {_WIDTH} '
        f'{_HEIGHT}" role="img">{"".join(parts)}</svg></figure>'
    )


def _corners(places: Sequence[tuple[float, float]], steps: bool) -> str:
    found = []
    for index, (right, down) in enumerate(places):
        if steps and index:
            found.append(f"{right:.1f},{places[index - 1][1]:.1f}")
        found.append(f"{right:.1f},{down:.1f}")
    return " ".join(found)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from below the lowest value to above the highest."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    step = 10 ** math.floor(math.log10((high - low) / 4))
    for factor in (1, 2, 5, 10):
        if (high - low) / (step * factor) <= 6:
            step *= factor
            break
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(tick * step, 12) for tick in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(low), max(math.ceil(high), math.floor(low) + 1)
    step = max(1, math.ceil((last - first) / 6))
    return [float(tick) for tick in range(first, last + step, step)]
