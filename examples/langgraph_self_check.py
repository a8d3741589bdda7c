"""A LangGraph that routes, checks itself, thinks again where it must, and survives being killed.

Why one would want it: a graph that runs for long is stopped some day, by a deploy or a crash. What was decided,
answered and doubted stands in the checkpoints, so that it goes on where it was and no answer is paid for twice.

The node ``answer`` is a KVRouteRouter: the prompt's difficulty picks the branch that answers at once or the one that
thinks. ``check`` looks at the confidence; an answer below --threshold is thought about once more.
It prints the nodes that ran and the answer. With ``--die`` the process ends hard before ``check``; then goes on:

    python examples/langgraph_self_check.py --database runs.sqlite --die
    python examples/langgraph_self_check.py --database runs.sqlite
"""

import argparse
import os
from pathlib import Path
from typing import Any

from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command

from kvroute import Router, TransformersEngine
from langchain_kvroute import ChatKVRoute, KVRouteRouter, kvroute_metadata

THINKER = Path(__file__).resolve().parent / "tiny_thinker"


class State(MessagesState):
    """The chat, and how often its answer was thought about again."""

    again: int


def build(saver: SqliteSaver, threshold: float, *, die: bool = False) -> Any:
    engine = TransformersEngine.from_pretrained(THINKER / "model")
    model = ChatKVRoute(engine=engine, confidence=THINKER / "confidence", max_tokens=192)
    fast, slow = model.bind(mode="fast"), model.bind(mode="slow")
    routed = KVRouteRouter(Router(engine, THINKER / "policy.json"), fast=fast, slow=slow)

    def answer(state: State) -> dict[str, Any]:
        return {"messages": [routed.invoke(state["messages"])], "again": 0}

    def think(state: State) -> dict[str, Any]:
        *asked, doubted = state["messages"]
        return {"messages": [slow.invoke(asked).model_copy(update={"id": doubted.id})], "again": 1}

    def check(state: State) -> Command[Any]:
        if die:
            os._exit(9)  # as a crash would: nothing is tidied up
        confidence = kvroute_metadata(state["messages"][-1])["confidence"]
        return Command(goto=END if confidence >= threshold or state["again"] else "think")

    graph = StateGraph(State)
    graph.add_node("answer", answer).add_node("think", think).add_node("check", check, destinations=("think", END))
    graph.add_edge(START, "answer").add_edge("answer", "check").add_edge("think", "check")
    return graph.compile(checkpointer=saver)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", default="runs.sqlite")
    parser.add_argument("--question", default="run a=7 b=7;1b=7;2a*8;3a=3;4b*a;5b+2")
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--die", action="store_true")
    given = parser.parse_args()
    with SqliteSaver.from_conn_string(given.database) as saver:
        graph, config = build(saver, given.threshold, die=given.die), {"configurable": {"thread_id": given.question}}
        waiting = graph.get_state(config).next
        print("goes on before:" if waiting else "begins", *waiting, flush=True)
        asked = None if waiting else {"messages": given.question}
        for ran in graph.stream(asked, config, stream_mode="updates", durability="sync"):
            print("ran:", *ran, flush=True)
        last = graph.get_state(config).values["messages"][-1]
        print(f"{last.text} ({kvroute_metadata(last)['mode']}, {kvroute_metadata(last)['confidence']:.2f})")


if __name__ == "__main__":
    main()
