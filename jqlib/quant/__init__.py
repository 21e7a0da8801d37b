"""Rounding a model: GPTQ, the KV cache, all of it in place."""
