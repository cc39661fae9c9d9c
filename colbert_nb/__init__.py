"""From your own (query, passage) pairs to a trained ColBERT (late-interaction) retrieval model."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .corpus import RetrievalDataset
    from .encoder import ColBERT
    from .scoring import maxsim, maxsim_pairwise
    from .trainer import RAGTrainer

# where each name lives: it is imported when it is first asked for, so that a part which needs no torch loads none
_MODULES = {"ColBERT": "encoder", "RAGTrainer": "trainer", "RetrievalDataset": "corpus", "maxsim": "scoring", "maxsim_pairwise": "scoring"}

__all__ = ["ColBERT", "RAGTrainer", "RetrievalDataset", "maxsim", "maxsim_pairwise", "__version__"]


def __getattr__(name: str) -> object:
    "A public name, from the module that holds it."
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
