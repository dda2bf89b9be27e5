"""Benchmarks: what the pipeline costs on this machine. `docs/benchmarks.md` says what each prints."""
