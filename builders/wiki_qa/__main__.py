"""`python -m builders.wiki_qa`."""

from builders.wiki_qa.task import TASK
from tracekit import main

main(TASK)
