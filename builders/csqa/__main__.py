"""`python -m builders.csqa`."""

from builders.csqa.task import TASK
from tracekit import main

main(TASK)
