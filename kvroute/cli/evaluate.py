"""``kvroute evaluate``: what is measured on held-out rows, one module a thing. Each writes JSON and a page."""

from __future__ import annotations

import typer

from kvroute.cli import evaluate_embeddings, evaluate_routing, evaluate_scores

app = typer.Typer(help="Measure on rows that nothing was fitted to; each command writes JSON and a page (report.html).")
app.callback()(lambda: None)  # keeps a group of one command a group
app.command("routing")(evaluate_routing.command)
app.command("embeddings")(evaluate_embeddings.command)
app.command("scores")(evaluate_scores.command)
