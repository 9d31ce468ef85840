"""`python -m builders.next_token`."""

from builders.next_token.task import TASK
from tracekit import main

main(TASK)
