"""The Llama 3 model family: sizes, network, tokenizer, chat format and checkpoints."""
