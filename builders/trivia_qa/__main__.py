"""`python -m builders.trivia_qa`."""

from builders.trivia_qa.task import TASK
from tracekit import main

main(TASK)
