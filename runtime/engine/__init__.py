"""Generation for batches of prompts from compressed caches: prefill, decode step, sampling, stopping."""
