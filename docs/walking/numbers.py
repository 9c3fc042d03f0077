"""Numbers as the pages print them: few digits, so that another processor's rounding prints the same or nearly so."""

from collections.abc import Iterable


def fixed(x: float, decimals: int = 3) -> str:
    """`decimals` digits after the point; never -0.000."""
    text = f"{float(x):.{decimals}f}"
    return text[1:] if text.startswith("-") and not text.strip("-0.") else text


def digits(x: float, count: int = 5) -> str:
    """`count` significant digits, for numbers of any size."""
    return f"{float(x):.{count}g}"


def row(values: Iterable[float], decimals: int = 3) -> list[str]:
    return [fixed(x, decimals) for x in values]


def total(values: Iterable[float], decimals: int = 3) -> str:
    """`0.1 + 0.2 - 0.3`: the terms of a sum as one writes them."""
    text = ""
    for x in values:
        term = fixed(x, decimals)
        minus = term.startswith("-")
        text += (" - " if minus else " + ") + term.lstrip("-") if text else term
    return text
