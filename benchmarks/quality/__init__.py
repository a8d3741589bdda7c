"""Parts of embedding_quality.py: data, extraction, candidates, measures."""
