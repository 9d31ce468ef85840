"""Benchmarks: how fast tracekit is beside the usual ways of doing the same thing. Every result is a ratio.

    python -m benchmarks             all of them; prints tables and writes benchmarks/results.json
    python -m benchmarks.capture     generation and capture, beside stepwise capture and plain generation
    python -m benchmarks.next_token  next-token traces, beside a bare forward pass of the same batches
    python -m benchmarks.writing     shards, beside a raw write of the same bytes
    python -m benchmarks.reading     one layer and a full scan, beside pickle, LMDB, Zarr, .npy and tar
    python -m benchmarks.loading     rows of tracekit.load_dataset, beside `datasets` with .npy
    python -m benchmarks.scale       100,000 samples: open, read at random, iterate, finish, verify (--quick)
    python -m benchmarks.growth      capture against layers, length and number of samples (--quick)
    make bench-peers                 capture beside SAELens, nnsight and TransformerLens, in their own environment
    python -m benchmarks.serve       requests to the logging server, beside plain generation

A benchmark waits for the machine to be quiet, repeats what other programs disturbed as long as its time allows, and
says so where it could not. torch gets one thread: two wait for one another at every layer whenever another program has
one of their cores, which slows the small matrices of token-by-token decoding tenfold and makes ratios worthless. On a
machine of your own try `--threads 2`.
"""
