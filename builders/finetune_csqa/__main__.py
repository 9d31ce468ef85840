"""`python -m builders.finetune_csqa`: flags are read before torch is imported."""

import sys

from builders.finetune_csqa.config import FinetuneConfig
from tracekit.cli import run_main

sys.exit(run_main("builders.finetune_csqa", "builders.finetune_csqa.command", FinetuneConfig))
