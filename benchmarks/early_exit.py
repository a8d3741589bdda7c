"""Texts a second: embedding from half the depth / full-depth base model (no LM head) that pools hidden states.

Both sides run the same batches of the same tokens.
"""

from __future__ import annotations

import torch

from _harness import Ratio, figure_table, finish, measure, parse_arguments
from _texts import mixed_texts
from kvroute import PoolingSpec, TransformersEngine
from kvroute.engines.batching import plan_batches


def main() -> None:
    arguments = parse_arguments(__doc__)
    engine = TransformersEngine.from_pretrained(arguments.model, dtype="float32")
    texts = mixed_texts(12 if arguments.quick else 40, arguments.seed)
    ids = engine.tokenize_texts(texts)
    half = PoolingSpec(layers=0.5, part="v", weights="sif", heads="concat", layer_reduce="concat")
    batches = plan_batches([len(i) for i in ids], engine.token_budget)

    @torch.inference_mode()
    def hidden_states() -> torch.Tensor:
        pooled = torch.empty(len(ids), engine.info.hidden_size)
        for batch in batches:
            width = max(len(ids[i]) for i in batch)
            rows = torch.tensor([ids[i] + [0] * (width - len(ids[i])) for i in batch])
            lengths = torch.tensor([len(ids[i]) for i in batch])
            real = (torch.arange(width)[None] < lengths[:, None]).float()
            last = engine.model.get_decoder()(input_ids=rows, use_cache=False).last_hidden_state
            pooled[batch] = (last * real[:, :, None]).sum(dim=1) / lengths[:, None]
        return pooled

    def half_depth() -> object:
        return engine.pool(ids, [half], progress=False)

    # Time of the baseline over our time is our throughput over the baseline's.
    rounds = measure(
        {"full depth, hidden states": hidden_states, "half depth, values": half_depth},
        {"early_exit_ratio": Ratio("full depth, hidden states", "half depth, values", ">= 1.8")},
        seconds=arguments.seconds,
        seed=arguments.seed,
    )
    for side in rounds.seconds:
        print(f"{side}: {len(texts) / rounds.median(side):.1f} texts/s")
    print("\n" + figure_table(rounds.figures))
    finish(
        arguments,
        name="early_exit",
        figures=rounds.figures,
        n={"texts": len(texts), "tokens": sum(map(len, ids))},
        baseline="full-depth base model without LM head, mean of the last hidden states, same batches",
    )


if __name__ == "__main__":
    main()
