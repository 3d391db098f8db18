"""Everything that knows vLLM: the patches, the hooks in the runners, admission in the engine core, the clients.

Nothing outside this folder imports vllm. Each place that replaces something of vLLM's carries a note: what, why, since
which version, and when it can go.
"""
