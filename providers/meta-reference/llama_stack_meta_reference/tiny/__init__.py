"""The tiny model: what it learns from, its training, how good it is: ``python -m llama_stack_meta_reference.tiny``."""
