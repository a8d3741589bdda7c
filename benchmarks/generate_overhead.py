"""Generate with both chains and an embedding / without features, and / model.generate: same prompts, greedy.

Batches are of prompts of different lengths.

`_within` splits the time of one call, as the engine reports it, into features and the rest, which a busy machine
disturbs alike; the others compare calls.
"""

from __future__ import annotations

import random

import torch

from _harness import Figure, Ratio, figure_table, finish, measure, parse_arguments, summarise
from _texts import text_of
from kvroute import TransformersEngine


def main() -> None:
    arguments = parse_arguments(__doc__)
    figures: dict[str, Figure] = {}
    engine = TransformersEngine.from_pretrained(arguments.model, dtype="float32")
    rng = random.Random(arguments.seed)
    tokens = 8 if arguments.quick else 16
    features = ["kv-coe", "prompt:best"]
    ends = engine.model.generation_config.eos_token_id
    for count in (1,) if arguments.quick else (1, 8):
        prompts = [text_of(48 - 3 * i, rng) for i in range(count)]
        ids = [engine.tokenize(p) for p in prompts]
        width = max(map(len, ids))
        padded = torch.tensor([[ends] * (width - len(i)) + i for i in ids])
        mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids])

        within: list[float] = []

        def with_features(prompts: list[str] = prompts, within: list[float] = within) -> object:
            written = engine.generate(prompts, max_tokens=tokens, features=features, progress=False)
            timings = max((g.timings for g in written), key=lambda t: t.total)
            within.append(timings.total / (timings.total - timings.features))
            return written

        def without(prompts: list[str] = prompts) -> object:
            return engine.generate(prompts, max_tokens=tokens, progress=False)

        @torch.inference_mode()
        def stock(padded: torch.Tensor = padded, mask: torch.Tensor = mask) -> torch.Tensor:
            return engine.model.generate(
                input_ids=padded, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=ends
            )

        ours = engine.generate(prompts, max_tokens=tokens, progress=False)
        theirs = stock()[:, width:].tolist()
        for mine, row in zip(ours, theirs, strict=True):
            assert row[: len(mine.token_ids)] == mine.token_ids, "both sides must write the same tokens"
        rounds = measure(
            {"features": with_features, "plain": without, "model.generate": stock},
            {
                f"generate_ratio_batch_{count}": Ratio("features", "plain", "<= 1.02"),
                f"generate_ratio_to_model_generate_batch_{count}": Ratio("features", "model.generate", "<= 1.02"),
            },
            seconds=arguments.seconds / 2,
            seed=arguments.seed,
        )
        figures |= rounds.figures
        figures[f"generate_ratio_batch_{count}_within"] = summarise(within[1:], "<= 1.02", seed=arguments.seed)
    print(figure_table(figures))
    finish(
        arguments,
        name="generate_overhead",
        figures=figures,
        n={"new_tokens": tokens},
        baseline="the same engine without features; model.generate",
    )


if __name__ == "__main__":
    main()
