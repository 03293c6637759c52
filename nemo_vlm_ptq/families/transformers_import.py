"""Import transformers in less time."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any


def import_transformers() -> None:
    """Import transformers' text generation, on which its configs depend, without scikit-learn.

    Generation imports scikit-learn's metrics where it is installed, which takes two seconds, for a
    method that this package does not use.
    """
    if "transformers" in sys.modules or "sklearn" in sys.modules:
        return
    modules: dict[str, Any] = sys.modules
    modules["sklearn"] = None  # as if it were not installed
    try:
        import_module("transformers.generation.candidate_generator")
    finally:
        del modules["sklearn"]
