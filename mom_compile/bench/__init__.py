"""Benchmarks behind ``mom-compile bench``: every figure beside a limit that was measured in the same run."""
