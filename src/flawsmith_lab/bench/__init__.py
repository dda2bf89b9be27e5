"""Benchmarks: what the pipeline costs on this machine. The README of the laboratory says how to read each."""
