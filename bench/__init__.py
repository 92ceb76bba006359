"""Benchmarks: each file is a command that writes JSON lines with the machine's description."""
