"""What turns texts into vectors: sentence models of the BERT family, and hashing where there is none."""

from .bert import BertEmbedder
from .choice import Chosen, choose_embedder
from .hashing import HashingEmbedder

__all__ = ["BertEmbedder", "Chosen", "HashingEmbedder", "choose_embedder"]
