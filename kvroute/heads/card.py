"""The model card of a head, in Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvroute.heads.head import DifficultyHead

_USE = {
    "difficulty": (
        "It maps the pooled keys and values of a prompt to a difficulty in [0, 100] (0: answering at once is right; "
        "75: only thinking first is; 100: neither), from which a router chooses between fast and slow thinking."
    ),
    "correct": (
        "It maps the pooled keys and values of an answer (its tokens but the last) to the probability that the answer "
        "is right."
    ),
}


def model_card(head: DifficultyHead) -> str:
    """What a person should know before using it."""
    lines = [
        f"# kvroute head: {head.target} for {head.model}",
        "",
        _USE[head.target],
        "",
        f"- Model: {head.model}, fingerprint `{head.fingerprint}`. Any other model is refused.",
        f"- Kind: {head.kind}, vectors of {head.predictor.dim} numbers.",
        f"- Pooling: `{head.spec.model_dump_json(exclude_defaults=True)}`",
        f"- Data: digest `{head.data_hash}`.",
    ]
    for name, value in head.details.items():
        lines.append(f"- {name}: {_plain(value)}")
    lines += ["", "## On held-out rows", ""]
    if head.metrics:
        lines += ["| metric | value |", "| --- | --- |"]
        lines += [f"| {name} | {value:.4g} |" for name, value in head.metrics.items()]
        lines += ["", "Nothing was fitted to these rows or chosen by them."]
    else:
        lines.append("There were none.")
    lines += [
        "",
        "## Limits",
        "",
        "The figures hold for questions like those it was trained on, asked in the same prompt of the same model. On "
        "others the difficulty is a guess: label some of them and measure before relying on it.",
        "",
    ]
    if head.windows is not None:
        lines += ["The folder `windows` holds the head for mid-thought, with a card of its own.", ""]
    lines += ["## Use", "", "```python", "from kvroute import DifficultyHead", ""]
    lines += ['head = DifficultyHead.load("this folder", engine.info)', "```", ""]
    return "\n".join(lines)


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return str(value)
