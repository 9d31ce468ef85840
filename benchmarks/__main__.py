"""All benchmarks, one after the other."""

import sys

from benchmarks import (
    capture,
    degradation,
    finetune,
    growth,
    loading,
    next_token,
    peers,
    prefix,
    reading,
    scale,
    serve,
    storage,
    writing,
)
from benchmarks.measure import parse_arguments


def main() -> int:
    """Run them all; a benchmark that cannot run says why."""
    parse_arguments("All benchmarks of tracekit.")
    benchmarks = (writing, reading, loading, scale, capture, next_token, growth, prefix, serve, storage, degradation)
    done = [benchmark.run() for benchmark in benchmarks]
    finetune.run()  # nothing to fail where its data is not there
    peers.run()  # nor where its environment is not
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
