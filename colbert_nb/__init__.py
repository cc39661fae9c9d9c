"""From your own (query, passage) pairs to a trained ColBERT (late-interaction) retrieval model."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .corpus import RetrievalDataset
    from .encoder import ColBERT
    from .hub import export_to_huggingface_hub
    from .onnx import export_to_vespa_onnx
    from .onnx_runtime import OnnxColBERT
    from .scoring import maxsim, maxsim_pairwise
    from .search import SearchIndex
    from .search_plaid import PlaidIndex
    from .trainer import RAGTrainer
    from .vespa import export_vespa_application

# where each name lives: it is imported when it is first asked for, so that a part which needs no torch loads none
_MODULES = {"ColBERT": "encoder", "OnnxColBERT": "onnx_runtime", "PlaidIndex": "search_plaid", "RAGTrainer": "trainer",
            "RetrievalDataset": "corpus", "SearchIndex": "search", "export_to_huggingface_hub": "hub", "export_to_vespa_onnx": "onnx",
            "export_vespa_application": "vespa", "maxsim": "scoring", "maxsim_pairwise": "scoring"}

__all__ = ["ColBERT", "OnnxColBERT", "PlaidIndex", "RAGTrainer", "RetrievalDataset", "SearchIndex", "export_to_huggingface_hub",
           "export_to_vespa_onnx", "export_vespa_application", "maxsim", "maxsim_pairwise", "__version__"]


def __getattr__(name: str) -> object:
    "A public name, from the module that holds it."
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
