"""`python -m builders.csqa_mcq`."""

from builders.csqa_mcq.task import TASK
from tracekit import main

main(TASK)
