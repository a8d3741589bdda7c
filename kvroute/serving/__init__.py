"""What runs inside and beside a vLLM server."""
