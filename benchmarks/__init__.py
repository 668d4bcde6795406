"""Benchmarks: every performance figure of this project, and the command that makes it (`make bench`)."""
