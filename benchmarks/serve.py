"""What a server costs beside calling the model, and what logging costs the server.

    plain     transformers' own generate, greedy, all prompts in one batch, in this process
    opted out the same prompts as concurrent chat requests to `tracekit serve`, none of them logged
    logged    the same, each with the hidden states of all layers captured and written

The server is given requests of all clients at once and may batch them as it finds them. `logged` counts until the last
answer is there; until the last sample is written stands beside it.
"""

import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import torch
import transformers

from benchmarks.measure import compare, interleave, parse_arguments, ratio_table, say, store_results
from tracekit.config import CaptureConfig, ModelConfig, PromptConfig
from tracekit.errors import ModelError
from tracekit.model.models import load_model, load_tokenizer, model_info
from tracekit.model.prompts import Prompter
from tracekit.serve.server import LoggingServer
from tracekit.serve.settings import ServerSettings

NUM_REQUESTS = 16
NUM_TOKENS = 32
_NUM_ROUNDS = 5
_MAX_SECONDS = 200

QUESTIONS = [f"Tell me {count} things about {topic}." for count in ("two", "five") for topic in (
    "rain", "the harbour of a small town", "bread", "how a bicycle keeps upright", "owls", "maps",
    "the difference between a lake and a pond", "chess",
)]  # fmt: skip


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of a server at work in a thread."""
    server = LoggingServer(
        folder,
        model=ModelConfig(model="demo", device="cpu"),
        capture=CaptureConfig(sites=("hidden_states",), num_replays=0),
        prompt=PromptConfig(),
        settings=ServerSettings(port=0, max_batch=NUM_REQUESTS, limit_new_tokens=NUM_TOKENS, close_after=3600.0),
    )
    with server:
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield server.url
        finally:
            server.stop()
            thread.join()


def ask_all(client: openai.OpenAI, *, is_logged: bool) -> list[str]:
    """All questions at once, each from a thread of its own."""

    def ask(question: str) -> str:
        reply = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": question}],
            max_tokens=NUM_TOKENS,
            temperature=0,
            store=is_logged,
        )
        return reply.choices[0].message.content or ""

    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        return list(pool.map(ask, QUESTIONS))


class Plain:
    """The same model called by hand."""

    def __init__(self) -> None:
        config = ModelConfig(model="demo", device="cpu")
        tokenizer = load_tokenizer(config)
        self._traced = load_model(config, model_info(config, variant="chat"), tokenizer, ())
        prompter = Prompter(tokenizer, PromptConfig(), default_system="")
        self._prompts = [prompter.chat([{"role": "user", "content": one}]).token_ids for one in QUESTIONS]

    def answers(self) -> list[str]:
        """Texts of the greedy answers."""
        model: Any = self._traced.model
        longest, pad = max(map(len, self._prompts)), model.generation_config.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(one)) + one for one in self._prompts])
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in self._prompts])
        with torch.inference_mode():
            made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NUM_TOKENS, do_sample=False)
        texts: Sequence[str] = self._traced.tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True)
        return [text.strip() for text in texts]


def run() -> Mapping[str, Any] | None:
    """Measure, print and store; None where the demo model is not installed."""
    transformers.utils.logging.disable_progress_bar()
    try:
        plain = Plain()
    except ModelError as error:
        say(f"serve: skipped. {error}")
        return None
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder) / "served") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
        served = [text.strip() for text in ask_all(client, is_logged=False)]
        num_equal = sum(a == b for a, b in zip(plain.answers(), served, strict=True))
        say(f"serve: {NUM_REQUESTS} requests of {NUM_TOKENS} tokens; {num_equal} texts equal those of plain generate")

        def settle(name: str) -> None:
            """A request after a logged batch waits for its capture: let it be done, and not be measured."""
            client.chat.completions.create(
                model="demo", messages=[{"role": "user", "content": "Hi"}], max_tokens=1, temperature=0, store=False
            )

        def logged_and_written(number: int) -> None:
            ask_all(client, is_logged=True)
            settle("")

        variants = {
            "plain": lambda number: plain.answers(),
            "opted out": lambda number: ask_all(client, is_logged=False),
            "logged": lambda number: ask_all(client, is_logged=True),
            "logged and written": logged_and_written,
        }
        rounds = interleave(variants, num_rounds=_NUM_ROUNDS, max_seconds=_MAX_SECONDS, before=settle)
    ratios = [
        compare("requests, not logged / plain generate", rounds, "opted out", "plain"),
        compare("requests, logged / not logged", rounds, "logged", "opted out"),
        compare("requests, logged and written / not logged", rounds, "logged and written", "opted out"),
    ]
    say(ratio_table("Serving", ratios))
    results = {"ratios": ratios, "num_requests": NUM_REQUESTS, "num_tokens": NUM_TOKENS, "equal_texts": num_equal}
    store_results("serve", results)
    return results


if __name__ == "__main__":
    parse_arguments(__doc__ or "")
    sys.exit(0 if run() else 1)
