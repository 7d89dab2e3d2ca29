"""A line chart with error bars as SVG text: no library draws without a display server or a browser here."""

import math
from collections.abc import Mapping, Sequence
from html import escape

Point = tuple[float, float, float | None]  # x, y, half the length of the error bar

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 40, 56
COLOURS = ("#888888", "#0067b1", "#d1495b", "#3a7d44", "#8e6c8a", "#edae49")


def lines(
    series: Mapping[str, Sequence[Point]], *, title: str, x_label: str, y_label: str, ticks: Mapping[float, str]
) -> str:
    """Draw series over a logarithmic x axis that is marked at `ticks`; y is in percent and its axis fits the data."""
    points = [point for row in series.values() for point in row]
    low = math.floor(max(0.0, min(y - (bar or 0) for _, y, bar in points)) / 10) * 10
    high = max(math.ceil(min(100.0, max(y + (bar or 0) for _, y, bar in points)) / 10) * 10, low + 10)
    first, last = math.log(min(ticks)), math.log(max(ticks))

    def across(x: float) -> float:
        share = (math.log(x) - first) / (last - first) if last > first else 0.5
        return LEFT + 12 + share * (WIDTH - LEFT - RIGHT - 24)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (min(max(y, low), high) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="13" role="img"><title>{escape(title)}</title>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(WIDTH / 2, 22, title, 'text-anchor="middle" font-size="15"'),
        _text(WIDTH / 2, HEIGHT - 12, x_label, 'text-anchor="middle"'),
        _text(16, HEIGHT / 2, y_label, f'text-anchor="middle" transform="rotate(-90 16 {HEIGHT / 2})"'),
    ]
    step = 10 if high - low <= 60 else 20
    for y in range(low, high + 1, step):
        parts.append(_line(LEFT, down(y), WIDTH - RIGHT, down(y), "#dddddd"))
        parts.append(_text(LEFT - 8, down(y) + 4, str(y), 'text-anchor="end"'))
    for x, label in ticks.items():
        parts.append(_line(across(x), HEIGHT - BOTTOM, across(x), HEIGHT - BOTTOM + 5, "#444444"))
        parts.append(_text(across(x), HEIGHT - BOTTOM + 20, label, 'text-anchor="middle"'))
    for number, (name, row) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y, _ in row)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, bar in row:
            parts.append(f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="3.5" fill="{colour}"/>')
            if bar:
                parts.append(_line(across(x), down(y - bar), across(x), down(y + bar), colour))
        at = HEIGHT - BOTTOM - 16 - 18 * (len(series) - 1 - number)
        parts.append(_line(WIDTH - RIGHT - 168, at - 4, WIDTH - RIGHT - 144, at - 4, colour))
        parts.append(_text(WIDTH - RIGHT - 138, at, name, ""))
    return "\n".join([*parts, "</svg>\n"])


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="1.5"/>'


def _text(x: float, y: float, words: str, style: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="#222222" {style}>{escape(words)}</text>'
