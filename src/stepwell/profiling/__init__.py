"""Where time and memory go: traces, timing reports, and what changed between two of those."""
