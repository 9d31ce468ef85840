"""`python -m builders.replay`."""

from builders.replay.task import TASK
from tracekit import main

main(TASK)
