"""What the tiny thinker can do: right answers by kind, by mode, by how much is left to compute; tool calls.

``run_left_n`` are runs with n steps behind the last one that sets a register, ``map_left_n`` maps with n arrows to
follow. Tool calls: the share that has the template's form, that has the right expression in it, and the share of
answers that say the tool's result right. Intervals are Wilson's.
"""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict

import _thinker
from _harness import figure_table, finish
from kvroute import Router, SamplingOptions
from kvroute.checkers import check

CALL = re.compile(r"<tool_call>\n(\{.*\})\n</tool_call>")


def main() -> None:
    arguments = _thinker.argument_parser(__doc__).parse_args()
    thinker = _thinker.engine(arguments.thinker)
    asked = _thinker.questions(200 if arguments.quick else 3000, arguments.seed + 6)
    chats = [[{"role": "user", "content": q.question}] for q in asked]
    router = Router(thinker, "slow", options=SamplingOptions(max_tokens=_thinker.MAX_TOKENS["slow"]))
    from questions import CALCULATOR, left, make_tool_chat  # _thinker.questions has put the folder on the path

    right: dict[str, list[bool]] = defaultdict(list)
    for mode in ("fast", "slow"):
        for q, answer in zip(asked, router.generate(chats, mode=mode, progress=False), strict=True):
            kind, good = str(q.extra["kind"]), check(answer.answer, q.answer, q.answer_type).correct
            right[f"{kind}_{mode}"].append(good)
            if (count := left(kind, q.question)) is not None:
                right[f"{kind}_left_{count}_{mode}"].append(good)
    rng = random.Random(arguments.seed)
    tools = [make_tool_chat(rng) for _ in range(20 if arguments.quick else 200)]
    how = {"mode": "fast", "template": {"tools": [CALCULATOR]}, "progress": False}
    calls = router.generate([chat[:1] for chat, _ in tools], **how)
    told = router.generate([chat[:3] for chat, _ in tools], **how)
    for (chat, result), call, answer in zip(tools, calls, told, strict=True):
        found = CALL.fullmatch(call.answer)
        right["tool_call_form"].append(found is not None)
        given = json.loads(found[1])["arguments"] if found else None
        right["tool_call_expression"].append(given == chat[1]["tool_calls"][0]["function"]["arguments"])
        right["tool_result_said"].append(answer.answer == f"it gives {result}.")
    figures = {name: _thinker.share(hits) for name, hits in sorted(right.items())}
    print(figure_table(figures))
    finish(
        arguments,
        name="thinker_abilities",
        figures=figures,
        n={"questions": len(asked), "tool_chats": len(tools)},
        baseline="fast beside slow",
    )


if __name__ == "__main__":
    main()
