"""`python -m builders.introspection`."""

from builders.introspection.task import TASK
from tracekit import main

main(TASK)
