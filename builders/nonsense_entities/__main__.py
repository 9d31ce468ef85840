"""`python -m builders.nonsense_entities`."""

from builders.nonsense_entities.task import TASK
from tracekit import main

main(TASK)
