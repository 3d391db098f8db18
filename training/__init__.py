"""Learning interventions: data, methods, trainer, evaluation. Knows nothing of vLLM or of the server."""
