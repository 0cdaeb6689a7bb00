"""Runs and benchmarks as one HTML page: read, counted, and written."""
