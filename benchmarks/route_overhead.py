"""One-step route and generate / generate: the same prompt, mode and tokens, with and without the decision.

The router prefills what both modes share, reads the head's vector from it, and runs the mode's own tokens behind it.
Without the decision prompt and mode's tokens are one prefill. What the decision costs is about one decode step, so
the ratio depends on how much is written: ``_short`` is beside it. ``_within`` is the share of one call that features,
head and policy took, which a busy machine disturbs less than the ratio between calls.
"""

from __future__ import annotations

import random

from _harness import Figure, Ratio, figure_table, finish, measure, parse_arguments, summarise
from _heads import costs_head
from _texts import text_of
from kvroute import Policy, Router, SamplingOptions, ThinkingMode, TransformersEngine
from kvroute.generation import TokenIds


def main() -> None:
    arguments = parse_arguments(__doc__)
    engine = TransformersEngine.from_pretrained(arguments.model, dtype="float32")
    head = costs_head(engine, arguments.seed)
    rng = random.Random(arguments.seed)
    thinking = ThinkingMode.of(engine)
    figures: dict[str, Figure] = {}
    lengths = {"_short": 16} if arguments.quick else {"": 128, "_short": 32}
    time_for = {"_short": 1.0} if arguments.quick else {"": 0.85, "_short": 0.15}  # the ratio that is judged needs most
    for name, tokens in lengths.items():
        # Random words as an instruction would end early: the answer's length is what is compared, so end tokens are
        # pushed out of reach by a text that the model goes on with.
        chat = [{"role": "user", "content": f"Repeat these words again and again: {text_of(200, rng)}"}]
        layout = thinking.layout(engine, chat)
        options = SamplingOptions(max_tokens=tokens)
        router = Router(engine, Policy(kind="one-step", tau=-1), head=head, thinking=thinking, options=options)
        whole = TokenIds(tuple(layout.base + layout.slow))
        within: list[float] = []

        def routed(router: Router = router, chat: object = chat, within: list[float] = within) -> object:
            found = router.generate(chat)  # type: ignore[call-overload]
            total = found.generation.timings.total
            within.append(total / (total - found.decision.seconds))
            return found

        def plain(whole: TokenIds = whole, options: SamplingOptions = options) -> object:
            return engine.generate(whole, options=options, progress=False)  # type: ignore[call-overload]

        one, two = routed(), plain()
        assert one.generation.token_ids == two.token_ids, "both sides must write the same tokens"  # type: ignore[attr-defined]
        assert one.usage.computed == two.usage.computed, "no token may be computed twice"  # type: ignore[attr-defined]
        print(f"{one.usage.prompt} prompt tokens, {one.usage.generated} written")  # type: ignore[attr-defined]
        rounds = measure(
            {"routed": routed, "plain": plain},
            {f"route_ratio{name}": Ratio("routed", "plain", "<= 1.02" if not name else None)},
            seconds=arguments.seconds * time_for[name],
            seed=arguments.seed,
        )
        figures |= rounds.figures
        must = "<= 1.02" if not name else None
        figures[f"route_ratio{name}_within"] = summarise(within[1:], must, seed=arguments.seed)
    print(figure_table(figures))
    finish(
        arguments, name="route_overhead", figures=figures, n=lengths, baseline="the same engine and tokens, no decision"
    )


if __name__ == "__main__":
    main()
