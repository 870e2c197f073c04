"""Llama in torch: inference, post-training and reward scoring as Llama Stack providers."""
