"""Train the tiny thinker: a Qwen3 of 0.9 M parameters that answers at once or thinks first.

``python examples/tiny_thinker/train.py`` writes model, tokenizer and chat template to ``--out``; about 13 minutes on
2 cores. The weights beside this file come from its default arguments, with OMP_NUM_THREADS=1 (sums round otherwise
with more threads, and so do the weights).
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from questions import CALCULATOR, make_question, make_tool_chat

SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
CHAT_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\ntools:' }}
{%- for tool in tools %}{{ ' ' + tool.function.name }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{%- set content = message.content or '' %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{{- '<|im_start|>assistant\\n' + content }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{%- set given = call.function.arguments %}
{{- given if given is string else given | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
FAST, SLOW, LEAVE, ENTER = "<think>\n\n</think>\n\n", "<think>\n", "\n</think>\n\n", "\n<think>\n"
END = "<|im_end|>"
KINDS = {"run": 0.46, "map": 0.4, "top": 0.1, "draw": 0.04}
"""Kinds of the questions that are trained on."""
STEPS = 1800
EXERCISES = 180
"""So many steps, the first, are of exercises in copying, which every look-up is made of."""
CORES = 2
"""A batch is worked on in so many parts, side by side."""
RATE = 0.006
"""Learning rate of the matrices at its height; that of the rest is half of it."""
SHARES = {"fast": 0.25, "slow": 0.33, "free": 0.15, "closed": 0.13, "entered": 0.09, "tools": 0.05}
"""Of the training samples: both modes, no mode given (the model opens a thought itself where one helps), thoughts
closed anywhere, thoughts opened in mid-answer, tool calls."""


CHOICE = 20.0
"""So many times does the token count by which the model chooses to think or not: it is one among a hundred."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids, and how much each counts in the loss; 0 for those that are not learned."""

    ids: list[int]
    weights: list[float]


Batch = tuple[Tensor, Tensor]
"""Token ids, and how much each counts: ``[size, width]`` both."""


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose digits and signs stand alone, trained on questions."""
    tokenizer = Tokenizer(models.BPE())
    # A register and its sign are one token, and so is an arrow with its nodes, digits stand alone: steps are short, and
    # an arrow is found by one token.
    pieces = Regex(r"\n+|\d|[ab][-+*=](?=[\dab])|[a-n]>[a-n]?| ?[A-Za-z]+|[^\w\s]|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(f"tokenizer {seed}")
    texts = []
    for _ in range(2000):
        made = make_question(rng, shares=KINDS)
        texts += [f"user\n{made.question}", f"assistant\n\n\n{made.fast}", made.thought, made.slow]
        chat, result = make_tool_chat(rng)
        call = '{"name": "calculator", "arguments": {"expression": "' + str(chat[1]["tool_calls"]) + '"}}'
        texts += ["system\ntools: calculator", chat[0]["content"], call, result]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=END,
        additional_special_tokens=[SPECIAL[1]],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    fast.add_tokens(MARKS, special_tokens=False)
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A fresh model.

    RoPE's base is small because texts are short: neighbours differ more in their angles, and look-ups have to tell them
    apart.
    """
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.15)
    return model


def make_samples(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, count: int, shares: dict[str, float] = SHARES
) -> list[Sample]:
    """Samples as training wants them. Only what the model itself writes is learned."""
    ways = rng.choices(list(shares), list(shares.values()), k=count)
    texts: list[tuple[str, list[tuple[str, bool]]]] = []
    for way in ways:
        if way in _OTHER_WAYS:
            texts.append((way, _OTHER_WAYS[way](tokenizer, rng)))
            continue
        made = make_question(rng, shares=KINDS)
        if way == "fast" and made.hard and rng.random() < 0.6:  # nobody can learn those: a few are enough
            way, made = "slow", make_question(rng, shares=KINDS)
        prompt = _prompt(tokenizer, made.question)
        thought_answer = SLOW + made.thought + LEAVE + made.slow
        pieces = {
            "fast": [(prompt + FAST, False), (made.fast + END, True)],
            "slow": [(prompt + SLOW, False), (made.thought + LEAVE + made.slow + END, True)],
            "free": [(prompt, False), ((thought_answer if made.think else made.fast) + END, True)],
            "closed": [(prompt + SLOW, False), (made.thought, False), (LEAVE, False), (made.slow + END, True)],
            "entered": [
                (prompt + FAST, False),
                (made.fast, False),
                (ENTER, False),
                (made.thought + LEAVE + made.slow + END, True),
            ],
        }[way]
        texts.append((way, pieces))
    encoded = iter(tokenizer([t for _, pieces in texts for t, _ in pieces], add_special_tokens=False)["input_ids"])
    samples = []
    for way, pieces in texts:
        ids: list[int] = []
        weights: list[float] = []
        for place, (_, learn) in enumerate(pieces):
            piece = next(encoded)
            if way in ("closed", "entered") and place == 1:
                piece = piece[: rng.randrange(len(piece) + 1)]
            ids += piece
            weights += [float(learn)] * len(piece)
            if way == "free" and learn:
                weights[-len(piece)] = CHOICE
        samples.append(Sample(ids, weights))
    return samples


def _tool_pieces(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> list[tuple[str, bool]]:
    chat, _ = make_tool_chat(rng)
    fast = rng.random() < 0.5
    opened = [
        tokenizer.apply_chat_template(
            chat[:n], tools=[CALCULATOR], tokenize=False, add_generation_prompt=True, enable_thinking=not fast
        )
        for n in (1, 3)
    ]
    whole = tokenizer.apply_chat_template(chat, tools=[CALCULATOR], tokenize=False)
    call = tokenizer.apply_chat_template(chat[:2], tools=[CALCULATOR], tokenize=False)
    thought = "" if fast else f"{SLOW}use calculator{LEAVE}"
    if rng.random() < 0.5:
        bare = tokenizer.apply_chat_template(chat[:1], tools=[CALCULATOR], tokenize=False, add_generation_prompt=True)
        return [(opened[0], False), (thought + call.removeprefix(bare).removesuffix("\n"), True)]
    bare = tokenizer.apply_chat_template(chat[:3], tools=[CALCULATOR], tokenize=False, add_generation_prompt=True)
    return [(opened[1], False), (thought + whole.removeprefix(bare).removesuffix("\n"), True)]


def _echo_pieces(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> list[tuple[str, bool]]:
    """A question, and once more."""
    question = make_question(rng, shares=KINDS).question
    if rng.random() < 0.2:
        question = make_tool_chat(rng)[0][0]["content"]
    return [(_prompt(tokenizer, question), False), (question + END, True)]


def _recall_pieces(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> list[tuple[str, bool]]:
    """A table, and behind each node its arrow, in another order."""
    question = make_question(rng, "map").question
    arrows = re.findall(r"\w>\w+", question)
    pieces = [(_prompt(tokenizer, question), False)]
    for arrow in rng.sample(arrows, len(arrows)):
        pieces += [(f"{arrow[0]};", False), (f"{arrow};", True)]
    return pieces


def _prompt(tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    chat = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


_OTHER_WAYS = {"echo": _echo_pieces, "recall": _recall_pieces, "tools": _tool_pieces}


def batches(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, size: int, exercises: int = 0, pool: int = 16
) -> Iterator[Batch]:
    """Batches of like lengths.

    The first ``exercises`` of them are of exercises in copying.
    """
    for _ in range(exercises):
        yield _padded(make_samples(tokenizer, rng, size, {"echo": 0.4, "recall": 0.6}))
    while True:
        samples = sorted(make_samples(tokenizer, rng, size * pool), key=lambda s: len(s.ids))
        places = list(range(0, len(samples), size))
        rng.shuffle(places)
        for at in places:
            yield _padded(samples[at : at + size])


def _padded(batch: list[Sample]) -> Batch:
    width = max(len(s.ids) for s in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    weights = torch.zeros(len(batch), width)
    for row, sample in enumerate(batch):
        ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        weights[row, : len(sample.ids)] = torch.tensor(sample.weights)
    return ids, weights


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al., 2024), in float32: ``torch.optim.Muon`` computes in
    bfloat16, which is slow on a CPU.

    Matrices of one shape are worked on together.
    """

    def __init__(self, matrices: list[Any], lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Any]] = {}
            for matrix in group["params"]:
                shapes.setdefault(matrix.shape, []).append(matrix)
            for shape, same in shapes.items():
                updates = []
                for matrix in same:
                    moving = self.state[matrix].setdefault("moving", torch.zeros_like(matrix))
                    moving.lerp_(matrix.grad, 1 - group["momentum"])
                    updates.append(matrix.grad.lerp(moving, group["momentum"]))
                scale = 0.2 * max(shape) ** 0.5
                for matrix, update in zip(same, orthogonal(torch.stack(updates)), strict=True):
                    matrix.mul_(1 - 0.01 * group["lr"]).add_(update, alpha=-group["lr"] * scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices, roughly: five Newton-Schulz steps on ``[n, rows, columns]``."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def loss_of(model: Any, ids: Tensor, weights: Tensor) -> Tensor:
    """Summed cross-entropy, weighted, over the learned tokens; the head runs on those alone."""
    states = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    target, weight = ids[:, 1:], weights[:, 1:]
    kept = weight > 0
    losses = torch.nn.functional.cross_entropy(model.lm_head(states[kept]), target[kept], reduction="none")
    return (losses * weight[kept]).sum()


def set_gradients(model: Any, ids: Tensor, weights: Tensor, pool: ThreadPoolExecutor) -> float:
    """Gradients of the mean loss over the learned tokens, each part of the batch in its own thread; the loss."""
    parameters = list(model.parameters())
    total = float(weights[:, 1:].sum())

    def work(part: int) -> tuple[float, tuple[Tensor, ...]]:
        torch.set_num_threads(1)
        loss = loss_of(model, ids[part::CORES], weights[part::CORES]) / total
        return loss.item(), torch.autograd.grad(loss, parameters)

    losses, parts = zip(*pool.map(work, range(CORES)), strict=True)
    for parameter, *gradients in zip(parameters, *parts, strict=True):
        parameter.grad = torch.stack(gradients).sum(0)
    return float(sum(losses))


def train(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int = 0,
    steps: int = STEPS,
    size: int = 48,
    log: Any = print,
) -> list[float]:
    """Train; returns the losses. The learning rate warms up, stays, and falls to zero over the last 40 %."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n or "lm_head" in n]
    optimizers = [
        Muon(matrices, lr=RATE),
        torch.optim.AdamW(rest, lr=RATE / 2, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    rates = [group["lr"] for o in optimizers for group in o.param_groups]
    losses: list[float] = []
    began = time.monotonic()
    model.train()
    pool = ThreadPoolExecutor(CORES)
    for step, (ids, weights) in enumerate(batches(tokenizer, random.Random(f"train {seed}"), size, EXERCISES)):
        if step >= steps:
            break
        scale = min(1.0, (step + 1) / 30) * min(1.0, (1 - step / steps) / 0.4)
        for group, rate in zip((g for o in optimizers for g in o.param_groups), rates, strict=True):
            group["lr"] = rate * scale
        losses.append(set_gradients(model, ids, weights, pool))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            recent = losses[-50:]
            log(f"{time.monotonic() - began:6.0f} s  step {step:5d}  loss {sum(recent) / len(recent):.3f}")
    pool.shutdown()
    model.eval()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer = build_tokenizer(arguments.seed)
    model = build_model(tokenizer, arguments.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    train(model, tokenizer, seed=arguments.seed, steps=arguments.steps)
    model.generation_config.do_sample = False
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
