"""`python -m builders.degradation`."""

from builders.degradation.task import TASK
from tracekit import main

main(TASK)
