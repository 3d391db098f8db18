"""The operations on batches of tokens: routing, the additive edit, the low-rank edit."""
