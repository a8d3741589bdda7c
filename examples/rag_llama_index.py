"""RAG with LlamaIndex where the model that answers also embeds: one model in memory, none beside it.

Indexes ten notes with ``KVRouteEmbedding`` over SmolLM2-135M, finds one for each question, and has the same engine
answer from it. Prints each question, the note that was found with its cosine, and the answer.

You would want it where a second model for embeddings costs memory or a service of its own: the language model is
loaded anyway, and a text is embedded with a quarter of its layers. The notes are few, so the embedder is fitted to them
by their mean alone; with some hundreds, ``fit(texts, dimension=256)`` whitens and finds more. With a larger model, give
it more than one note: this one is easily led astray by a second.
"""

from __future__ import annotations

from typing import Any

from llama_index.core import Document, PromptTemplate, VectorStoreIndex
from llama_index.core.llms import CompletionResponse, CompletionResponseGen, CustomLLM, LLMMetadata
from llama_index.core.llms.callbacks import llm_completion_callback

from kvroute import KVEmbedder, TransformersEngine
from llama_index.embeddings.kvroute import KVRouteEmbedding

NOTES = [
    "The office in Lisbon opens at nine and closes at six; on Fridays it closes at three.",
    "Parcels are picked up at the loading dock behind building C every day at four.",
    "The wifi password for guests is changed on the first Monday of each month; ask the front desk.",
    "Travel costs are paid back within ten days if the receipts are handed in by the 25th.",
    "The canteen serves lunch from twelve to two; the vegetarian dish is marked in green.",
    "New laptops are ordered from the IT desk and take about two weeks to arrive.",
    "The fire drill takes place every year in October; everybody gathers at the car park.",
    "Bicycles can be parked in the basement; the key is with the security guard.",
    "Sick days are reported to your manager by phone before ten in the morning.",
    "The meeting room on the third floor is booked with the calendar named Atlantis.",
]
QUESTIONS = ["Where can I park my bicycle?", "When does the canteen serve lunch?", "When are parcels picked up?"]
PROMPT = PromptTemplate("{context_str}\n\nAnswer from the note above in one short sentence: {query_str}")


class EngineLLM(CustomLLM):
    """A kvroute engine as LlamaIndex sees a language model: just enough to answer."""

    engine: Any

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(context_window=self.engine.info.context, num_output=48, model_name=self.engine.info.name)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **_: Any) -> CompletionResponse:  # noqa: ARG002 - theirs
        answer = self.engine.generate([{"role": "user", "content": prompt}], max_tokens=48)
        return CompletionResponse(text=answer.text)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **_: Any) -> CompletionResponseGen:  # noqa: ARG002
        yield self.complete(prompt)


def main() -> None:
    engine = TransformersEngine.from_pretrained("smollm2", dtype="float32")
    embedder = KVEmbedder(engine).fit(NOTES, method="center")
    embedding = KVRouteEmbedding(embedder=embedder)
    index = VectorStoreIndex.from_documents([Document(text=note) for note in NOTES], embed_model=embedding)
    answers = index.as_query_engine(llm=EngineLLM(engine=engine), similarity_top_k=1, text_qa_template=PROMPT)
    for question in QUESTIONS:
        found = answers.query(question)
        print(f"\n{question}")
        for node in found.source_nodes:
            print(f"  {node.score:.2f}  {node.node.get_content()}")
        print(f"  -> {str(found).strip()}")


if __name__ == "__main__":
    main()
