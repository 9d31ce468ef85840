"""The page of results says what results.json says, and is the one that is committed."""

import json
import re
from pathlib import Path

from benchmarks.page import render

FOLDER = Path(__file__).parent.parent / "benchmarks"
RESULTS = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))


def test_the_committed_page_is_made_of_the_committed_results():
    assert (FOLDER / "RESULTS.md").read_text(encoding="utf-8") == render(RESULTS)


def test_every_ratio_stands_on_the_page_with_its_reach_and_every_benchmark_with_its_machine():
    page = render(RESULTS)
    ratios = [ratio for result in RESULTS.values() for ratio in result.get("ratios", [])]
    assert len(ratios) > 20
    for ratio in ratios:
        (row,) = [
            line for line in page.splitlines() if line.startswith(f"| {ratio['name']} | {ratio['median']:,.4g} |")
        ]
        assert ("**not met**" in row) == (ratio["is_met"] is False)
        assert ("disturbed" in row) == (not ratio["is_calm"])
    assert len(re.findall(r"^On \d+ cores of ", page, re.MULTILINE)) == len(RESULTS)
