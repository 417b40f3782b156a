"""Other quantizers, each run in an environment of its own, for comparison with cvxq."""
