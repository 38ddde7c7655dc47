"""Sizes for people."""

GIB = 2**30


def size_text(size: float) -> str:
    """Bytes with a unit."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(size) >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size:,.0f} B"
