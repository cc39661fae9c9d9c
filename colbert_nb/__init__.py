"""From your own (query, passage) pairs to a trained ColBERT (late-interaction) retrieval model."""

__version__ = "0.1.0"

from .corpus import RetrievalDataset
from .encoder import ColBERT
from .scoring import maxsim, maxsim_pairwise
from .trainer import RAGTrainer

__all__ = ["ColBERT", "RAGTrainer", "RetrievalDataset", "maxsim", "maxsim_pairwise", "__version__"]
