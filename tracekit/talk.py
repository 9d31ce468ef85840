"""What is said to the person at the terminal: on stderr, above whatever progress bar is there."""

import sys

from tqdm import tqdm

__all__ = ["say"]


def say(text: str) -> None:
    """Say one line."""
    tqdm.write(f"tracekit: {text}", file=sys.stderr)
