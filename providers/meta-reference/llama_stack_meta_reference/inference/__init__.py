"""Inference over the Llama network: cache, scheduler, sampler and engine."""
