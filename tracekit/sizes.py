"""Sizes, durations and shares as people read them."""

import re

__all__ = ["bar", "duration", "filesize", "parse_size"]

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]i?)?B?")
_FACTORS = {"": 1} | {prefix: 1000**n for n, prefix in enumerate("KMGT", 1)}
_FACTORS |= {f"{prefix}i": 1024**n for n, prefix in enumerate("KMGT", 1)}


def filesize(num_bytes: float) -> str:
    """A size for people: three digits and a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def parse_size(text: str) -> int | None:
    """Bytes of a size as people write it, `20GiB`, `1.5GB`, `500MB` or a bare number; None where it is none."""
    found = _SIZE.fullmatch(text)
    return None if found is None else int(float(found[1]) * _FACTORS[found[2] or ""])


def duration(seconds: float) -> str:
    """A duration for people: hours and minutes, minutes and seconds, or seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def bar(share: float, *, width: int = 20) -> str:
    """A share, 0 to 1, as a bar of `width` characters: `#####...............`."""
    filled = round(min(max(share, 0.0), 1.0) * width)
    return "#" * filled + "." * (width - filled)
