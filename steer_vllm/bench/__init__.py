"""`steer-vllm bench`: what the plugin costs on the machine at hand, against plain vLLM in the same run.

Engines run in processes of their own (`engine.probe`); nothing here imports vllm.
"""
