"""Word messages: numbers with their nouns."""


def format_count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is one: "1 step", "1,200 steps", "2 processes"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")
