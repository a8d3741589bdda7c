"""LlamaIndex is imported once without its warnings as errors: 0.14.0 is older than the pydantic it runs with here."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import llama_index.core.ingestion
    import llama_index.core.llms  # noqa: F401
