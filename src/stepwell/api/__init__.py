"""Wire formats: JSON bodies to requests, results to JSON bodies. No web framework, no torch."""
