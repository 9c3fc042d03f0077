"""Drawings in SVG, made from numbers: the four models, the masks, one response, clipping, an update's time.

Colours are classes, so that a drawing follows the page it stands in, or the reader's system where it is a file.
"""

from html import escape

FIGURE_CSS = """
.fig text { fill: #1d2126; font: 13px system-ui, sans-serif; } .fig .soft { fill: #5c646d; }
.fig .mono { font: 12px ui-monospace, monospace; } .fig .b { font-weight: 600; } .fig .small { font-size: 11px; }
.fig .box { fill: #f6f7f9; stroke: #98a1ab; } .fig .on { fill: #1f6fc4; } .fig .off { fill: #d9dde2; }
.fig .learns { fill: #dcebfb; stroke: #1f6fc4; } .fig .frozen { fill: #ececef; stroke: #7d858e; }
.fig .wire { fill: none; stroke: #7d858e; stroke-width: 1.5; } .fig .tip { fill: #7d858e; } .fig .axis { stroke: #98a1ab; }
.fig .up { fill: #1f6fc4; } .fig .down { fill: #c0504d; } .fig .value { fill: #7f8fa6; } .fig .curve { fill: none; stroke: #1d2126; stroke-width: 1.5; }
.fig .band { fill: #98a1ab; opacity: .18; } .fig .hit { fill: transparent; } .fig .lit .hit, .fig .lit.hit { fill: #f0c433; opacity: .35; }
.fig g[data-t].lit { background: none; }
@media (prefers-color-scheme: dark) {
.fig text { fill: #e3e6ea; } .fig .soft { fill: #98a1ab; } .fig .box { fill: #1d2126; stroke: #5c646d; }
.fig .on { fill: #4d94e0; } .fig .off { fill: #363c44; } .fig .learns { fill: #17324f; stroke: #4d94e0; }
.fig .frozen { fill: #2a2e34; stroke: #7d858e; } .fig .up { fill: #4d94e0; } .fig .down { fill: #e07b78; } .fig .curve { stroke: #e3e6ea; }
}
"""
BACKGROUND = ".fig .page { fill: #ffffff; } @media (prefers-color-scheme: dark) { .fig .page { fill: #14171a; } }"


def drawing(width: int, height: int, parts: list[str]) -> str:
    """The inside of a figure, `width` x `height` pixels; narrower pages scroll it."""
    return (
        f'<svg class="fig" xmlns="http://www.w3.org/2000/svg" viewBox="-8 0 {width + 8} {height}" width="{width + 8}" '
        f'height="{height}">{"".join(parts)}</svg>'
    )


def standalone(svg: str) -> str:
    """The same as a file: with its style, and a page of its own behind it."""
    head, rest = svg.split(">", 1)
    return (
        f'{head}><style>{FIGURE_CSS}{BACKGROUND}</style><rect class="page" x="-8" width="100%" height="100%" rx="6"/>{rest}\n'
    )


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}" xml:space="preserve">{escape(words)}</text>'


def rect(x: float, y: float, w: float, h: float, kind: str, r: float = 3) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" class="{kind}" rx="{r}"/>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str = "axis") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def arrow(*points: tuple[float, float]) -> str:
    """A wire through the points with a tip at its end; the last piece is horizontal or vertical."""
    (x0, y0), (x, y) = points[-2:]
    dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    tip = f"{x:.1f},{y:.1f} {x - 8 * dx - 4 * dy:.1f},{y - 8 * dy - 4 * dx:.1f} {x - 8 * dx + 4 * dy:.1f},{y - 8 * dy + 4 * dx:.1f}"
    return f'<polyline class="wire" points="{path}"/><polygon class="tip" points="{tip}"/>'


def pipeline(shapes: dict[str, str]) -> str:
    """The four models of PPO and what flows between them. shapes: tensor -> its shape, as printed."""
    parts = []

    def box(x, y, w, h, title, *lines, kind="box"):
        parts.append(rect(x, y, w, h, kind, 6))
        parts.append(text(x + w / 2, y + 20, title, "b", "middle"))
        parts.extend(text(x + w / 2, y + 37 + 15 * i, words, "soft small", "middle") for i, words in enumerate(lines))

    box(20, 130, 112, 56, "queries", shapes["queries"])
    box(20, 330, 112, 56, "responses", shapes["responses"])
    models = [
        ("policy", "learns; began as SFT", "learns"), ("reference", "the SFT model, frozen", "frozen"),
        ("reward model", "frozen", "frozen"), ("critic", "learns; began as the RM", "learns"),
    ]  # fmt: skip
    tops = [40, 150, 260, 370]
    for top, (name, about, kind) in zip(tops, models, strict=True):
        box(210, top, 170, 64, name, about, kind=kind)
    parts.append(arrow((76, 130), (76, 60), (210, 60)))
    parts.append(text(84, 52, "sample R tokens", "small soft"))
    parts.append(arrow((210, 90), (160, 90), (160, 345), (132, 345)))
    for top in tops[1:]:
        parts.append(arrow((132, 366), (185, 366), (185, top + 32), (210, top + 32)))
    outs = ["logprobs", "ref_logprobs", "scores", "values"]
    for top, name in zip(tops, outs, strict=True):
        parts.append(
            arrow((380, 182), (585, 182), (585, 112)) if top == 150 else arrow((380, top + 32), (520, top + 32))
        )
        parts.append(text(390, top + 24, name, "mono"))
        parts.append(text(390, top + 48, shapes[name], "small soft"))
    box(520, 56, 130, 56, "KL a token", "log-prob differences")
    box(520, 262, 130, 62, "rewards", "-kl_coef KL, score", "one step after EOS")
    parts.append(arrow((650, 84), (690, 84), (690, 240), (600, 240), (600, 262)))
    box(520, 376, 130, 56, "GAE, whitening", shapes["rewards"])
    parts.append(arrow((585, 324), (585, 376)))
    box(520, 484, 130, 56, "two losses", "clipped")
    parts.append(arrow((570, 432), (570, 484)))
    parts.append(text(562, 462, "advantages", "mono", "end"))
    parts.append(arrow((600, 432), (600, 484)))
    parts.append(text(608, 462, "returns", "mono"))
    box(270, 484, 110, 56, "AdamW", "policy and critic")
    parts.append(arrow((520, 512), (380, 512)))
    parts.append(text(450, 504, "gradient", "small soft", "middle"))
    parts.append(arrow((295, 484), (295, 434)))
    parts.append(text(303, 462, "and the policy", "small soft"))
    return drawing(720, 560, parts)


def strip(names: list[str], rows: list[tuple[str, list[bool], str]], note: list[str]) -> str:
    """Masks as a picture: a column a token, a row a mask. rows: (name, where it is on, class of the squares)."""
    step, left, top = 30, 104, 92
    parts = []
    for t, name in enumerate(names):
        x = left + step * t
        cells = "".join(
            rect(x + 2, top + 30 * i, step - 4, 22, kind if row[t] else "off") for i, (_, row, kind) in enumerate(rows)
        )
        label = f'<g transform="rotate(-55 {x + 14} {top - 8})">{text(x + 14, top - 8, name, "mono")}</g>'
        number = text(x + step / 2, top + 30 * len(rows) + 14, str(t), "small soft", "middle")
        parts.append(f'<g data-t="{t}">{rect(x, 0, step, top + 30 * len(rows) + 20, "hit")}{label}{cells}{number}</g>')
    parts += [text(0, top + 16 + 30 * i, name, "mono") for i, (name, _, _) in enumerate(rows)]
    bottom = top + 30 * len(rows) + 38
    parts += [text(0, bottom + 18 * i, words, "small soft") for i, words in enumerate(note)]
    return drawing(left + step * len(names) + 70, bottom + 18 * len(note), parts)


def bars(names: list[str], rows: list[tuple[str, list[float], str]]) -> str:
    """One response as bars: a column a token, a band a quantity, all to one scale."""
    step, left, top, band = 46, 104, 84, 92
    most = max(abs(value) for _, values, _ in rows for value in values) or 1.0
    parts = []
    for i, (title, _, _) in enumerate(rows):
        middle = top + band * i + band / 2
        parts.append(line(left, middle, left + step * len(names), middle))
        parts.append(text(0, middle - 2, title, "b"))
    for t, name in enumerate(names):
        x = left + step * t
        inside = [f'<g transform="rotate(-55 {x + 22} {top - 6})">{text(x + 22, top - 6, name, "mono")}</g>']
        for i, (_, values, kind) in enumerate(rows):
            middle = top + band * i + band / 2
            height = 28 * abs(values[t]) / most
            up = values[t] >= 0
            inside.append(
                rect(x + 9, middle - height if up else middle, step - 18, height, kind or ("up" if up else "down"), 1)
            )
            label = f"{values[t]:.2f}".replace("-0.00", "0.00")
            inside.append(
                text(x + step / 2, middle - height - 4 if up else middle + height + 12, label, "small", "middle")
            )
        parts.append(f'<g data-t="{t}">{rect(x, 0, step, top + band * len(rows), "hit")}{"".join(inside)}</g>')
    return drawing(left + step * len(names) + 60, top + band * len(rows) + 6, parts)


def clipping(dots: list[tuple[float, float]], cliprange: float, own: list[tuple[int, float, float]]) -> str:
    """The clipped objective per unit of |A| against the ratio, for A > 0 and A < 0, with tokens on it.

    dots: (ratio, advantage) of the batch's tokens; own: (index, ratio, advantage) of the response that is walked
    """
    size, gap, left, top, low, high = 300, 60, 52, 36, 0.4, 1.6
    parts = []
    for panel, sign in enumerate((1, -1)):
        x0 = left + panel * (size + gap)
        scale = size / (high - low)
        bottom_y = low if sign > 0 else -high

        def place(ratio, x0=x0, sign=sign, scale=scale, bottom_y=bottom_y):
            ratio = min(max(ratio, low), high)
            inside = min(max(ratio, 1 - cliprange), 1 + cliprange)
            y = min(sign * ratio, sign * inside)  # the objective, in units of |A|
            return x0 + (ratio - low) * scale, top + size - (y - bottom_y) * scale

        parts.append(rect(x0 + (1 - cliprange - low) * scale, top, 2 * cliprange * scale, size, "band", 0))
        parts.append(line(x0, top + size, x0 + size, top + size))
        parts.append(line(x0, top, x0, top + size))
        points = [low, 1 - cliprange, 1 + cliprange, high]
        path = " ".join("{:.1f},{:.1f}".format(*place(ratio)) for ratio in points)
        parts.append(f'<polyline class="curve" points="{path}"/>')
        for ratio, advantage in dots:
            if advantage * sign > 0:
                x, y = place(ratio)
                parts.append(
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" class="{"up" if sign > 0 else "down"}" opacity=".5"/>'
                )
        for t, ratio, advantage in own:
            if advantage * sign > 0:
                x, y = place(ratio)
                parts.append(
                    f'<g data-t="{t}"><circle cx="{x:.1f}" cy="{y:.1f}" r="10" class="hit"/>'
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" class="{"up" if sign > 0 else "down"}"/></g>'
                )
        parts.append(
            text(x0 + size / 2, 20, "A > 0: make it likelier" if sign > 0 else "A < 0: make it rarer", "b", "middle")
        )
        for ratio in (low, 1 - cliprange, 1.0, 1 + cliprange, high):
            parts.append(text(x0 + (ratio - low) * scale, top + size + 18, f"{ratio:g}", "small soft", "middle"))
        parts.append(text(x0 + size / 2, top + size + 36, "ratio", "soft", "middle"))
        for y in (bottom_y, sign * 1.0, bottom_y + high - low):
            parts.append(text(x0 - 6, top + size - (y - bottom_y) * scale + 4, f"{y:g}", "small soft", "end"))
    return drawing(left + 2 * size + gap + 20, top + size + 46, parts)


def durations(rows: list[tuple[str, float]]) -> str:
    """Seconds of the phases of an update, one bar after the other."""
    total, left, width = sum(seconds for _, seconds in rows), 10, 640
    parts, x = [], float(left)
    for i, (name, seconds) in enumerate(rows):
        w = width * seconds / total
        parts.append(rect(x, 24, max(w - 2, 1), 34, ("value", "down", "up")[i % 3]))
        label_x = left + 220 * i
        parts.append(rect(label_x, 76, 12, 12, ("value", "down", "up")[i % 3]))
        parts.append(text(label_x + 18, 87, f"{name} {seconds:.2f} s, {seconds / total:.0%}"))
        x += w
    parts.append(text(left, 16, f"{total:.1f} s an update", "soft"))
    return drawing(left + width + 10, 100, parts)
