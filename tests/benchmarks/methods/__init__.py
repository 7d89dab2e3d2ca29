"""Every unsupervised method after the same seconds of training: `python -m tests.benchmarks.methods --help`."""
