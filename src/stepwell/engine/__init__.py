"""The engine: a scheduler that decides steps, a worker that takes them, and the loop between."""
