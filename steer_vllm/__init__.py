"""Representation interventions in vLLM: the core."""
