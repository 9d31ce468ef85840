"""Next-token predictions: a language model reads texts, and every prediction it makes on the way is kept.

Label-free: one teacher-forced pass over treebank sentences (UD EWT), comments (GoEmotions), questions (CommonsenseQA),
encyclopedic articles (WikiText) or any other text; nothing is generated. builders/next_token/texts.py says where they
come from.

A document longer than `--max-seq-len` tokens is cut into windows; each is an example of its own. Perplexity over a run
is the usual sliding-window one: windows advance by `--stride` tokens, only tokens that no earlier window has scored
count, and the first token of a document (without overlap: of every window) is predicted by nothing.

    tokens     0 1 2 3 4 5 6 7 8 9      --max-seq-len 6 --stride 4
    window 0   0 1 2 3 4 5                scores 1 2 3 4 5
    window 1           4 5 6 7 8 9        scores 6 7 8 9 (num_context 2)

    python -m builders.next_token --model demo --source wikitext2 --split test --sites hidden_states
"""

from builders.next_token.config import NextTokenConfig
from builders.next_token.record import NextTokenRecord
from tracekit.records import Mean, Number, Outcome
from tracekit.task import Task, lazy

__all__ = ["TASK"]


TASK = Task(
    name="next_token",
    title="Texts as a language model reads them: what it expected next at every position, and what came.",
    config=NextTokenConfig,
    record=NextTokenRecord,
    examples=lazy("builders.next_token.windows:windows"),
    tracer=lazy("builders.next_token.tracer:NextTokenTracer"),
    replay=lazy("builders.next_token.tracer:NextTokenReplay"),
    card="next_token.md.j2",
    outcome=Outcome(
        asked="text",
        numbers=[
            Number(name="loss", field="loss", unit="nats"),
            Number(name="perplexity", field="perplexity"),
            Number(name="entropy", field="next_entropy", unit="nats"),
            Number(name="next_token_accuracy", field="next_correct"),
        ],
        means=[
            Mean(
                name="loss",
                field="loss",
                over="num_scored",
                unit="nats",
                definition="Mean negative log-probability of the scored tokens.",
            ),
            Mean(name="perplexity", field="loss", over="num_scored", is_exp=True, definition="exp of the mean loss."),
            Mean(
                name="next_token_accuracy",
                field="next_correct",
                over="num_scored",
                definition="Share of the scored tokens that were the most probable one.",
            ),
        ],
        same=["text"],
    ),
)
