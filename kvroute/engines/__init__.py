"""Engines: what runs the model. One file each."""
