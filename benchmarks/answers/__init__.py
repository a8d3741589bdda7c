"""Parts of ``score_quality.py``: answers written once, their keys and values, searches on open answers."""
