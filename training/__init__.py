"""Learning interventions: data, methods, trainer. Knows nothing of vLLM or of the server."""
