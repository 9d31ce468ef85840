"""All benchmarks, one after the other."""

import sys

from benchmarks import capture, degradation, finetune, loading, next_token, prefix, reading, serve, writing
from benchmarks.measure import parse_arguments


def main() -> int:
    """Run them all; a benchmark that cannot run says why."""
    parse_arguments("All benchmarks of tracekit.")
    done = [
        benchmark.run() for benchmark in (writing, reading, loading, capture, next_token, prefix, serve, degradation)
    ]
    finetune.run()  # nothing to fail where its data is not there
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
