"""What the benchmarks share that run servers or live engines: models, processes, clients."""
