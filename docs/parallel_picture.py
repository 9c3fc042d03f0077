"""Draws docs/parallel.svg, who holds what on four GPUs: python -m docs.parallel_picture"""

from pathlib import Path

from nanorlhf.run.streams import as_command

GPUS = 4
SMALL = 'font-family="sans-serif" font-size="12"'
ROWS = [  # (what, a second line, colour, whole on each GPU or in parts)
    ("actor: the policy, whole", "2 bytes a parameter", "#4c78a8", True),
    ("policy: fp32 masters, gradients, moments", "16 bytes a parameter, divided", "#f58518", False),
    ("critic: the same", "16 bytes a parameter, divided", "#e45756", False),
    ("reference", "2 bytes a parameter, divided", "#72b7b2", False),
    ("reward model", "2 bytes a parameter, divided", "#54a24b", False),
    ("posts of a batch", "each its share, results on all", "#9d9d9d", False),
]
LEFT, WIDE, GAP, HIGH, TOP = 292, 132, 14, 44, 46


def picture() -> str:
    width, height = LEFT + GPUS * (WIDE + GAP) + 6, TOP + len(ROWS) * (HIGH + 8) + 96
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" {SMALL}>',
             f'<rect width="{width}" height="{height}" fill="white"/>']  # fmt: skip
    for gpu in range(GPUS):
        x = LEFT + gpu * (WIDE + GAP)
        parts.append(f'<text x="{x + WIDE / 2}" y="24" text-anchor="middle" font-weight="bold">process {gpu}, GPU {gpu}'
                     "</text>")  # fmt: skip
    for i, (what, size, colour, whole) in enumerate(ROWS):
        y = TOP + i * (HIGH + 8)
        parts.append(f'<text x="8" y="{y + 18}">{what}</text><text x="8" y="{y + 34}" fill="#666">{size}</text>')
        for gpu in range(GPUS):
            x = LEFT + gpu * (WIDE + GAP)
            parts.append(f'<rect x="{x}" y="{y}" width="{WIDE}" height="{HIGH}" fill="none" stroke="#bbb"/>')
            begin, size = (0, WIDE) if whole else (gpu * WIDE / GPUS, WIDE / GPUS)
            parts.append(f'<rect x="{x + begin:g}" y="{y}" width="{size:g}" height="{HIGH}" fill="{colour}"/>')
    y = TOP + len(ROWS) * (HIGH + 8) + 16
    for line in ("rollout, score: an actor samples its rows; parts of the others are gathered a block at a time, used, given up",
                 "learn: gathered forwards, gathered again backwards; gradients are summed in fp32 to the part's owner",
                 "after an update: the parts of the policy fill the actors, in place. Process 0 writes all files"):  # fmt: skip
        parts.append(f'<text x="8" y="{y}">{line}</text>')
        y += 20
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    Path(__file__).with_name("parallel.svg").write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    as_command(main)
