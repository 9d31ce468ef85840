"""A literal record for tests."""

from typing import Any

import msgspec

from tracekit.records import (
    SCHEMA_VERSION,
    GenerationSettings,
    ModelInfo,
    SampledAnswer,
    Span,
    TriviaQARecord,
)
from tracekit.tensors import TensorSpec


def trivia_record(**changes: Any) -> TriviaQARecord:
    """One literal TriviaQA record, with changes."""
    record = TriviaQARecord(
        schema_version=SCHEMA_VERSION,
        key="000000",
        example_id="tc_1",
        question_id="tc_1",
        sample_index=0,
        config="trivia_qa",
        split="validation",
        model=ModelInfo(
            id="org/name",
            revision="abc",
            variant="chat",
            adapter=None,
            quantization=None,
            dtype="float32",
            attention="eager",
        ),
        prompt="Q",
        prompt_sha256="0" * 64,
        input_sha256="1" * 64,
        template_sha256=None,
        token_ids=[1, 2, 3],
        tokens=["a", "b", "c"],
        token_offsets=[[0, 1], [1, 2], [2, 3]],
        prompt_length=1,
        spans=[Span(name="user", start=0, stop=1)],
        last_prompt_index=0,
        first_answer_index=1,
        last_answer_index=2,
        eos_included=False,
        tensors=[
            TensorSpec(
                name="hidden_states",
                dtype="float32",
                shape=[2, 3, 4],
                axes=["L", "T", "D"],
                layers=[0, 1],
                positions=[[0, 3]],
                layout="dense",
                num_keys=0,
                choice_offsets=[],
            )
        ],
        generation=GenerationSettings(
            do_sample=False, num_beams=1, max_new_tokens=2, temperature=1.0, top_p=1.0, top_k=0
        ),
        seed=41,
        question="Q?",
        generated_text="Qbc",
        generated_answer="bc",
        generated_token_ids=[2, 3],
        num_layers=1,
        ground_truth_answers=["bc", "b c"],
        global_example_id=0,
        shard=0,
        index_in_shard=0,
        token_logprobs=[-0.5, -1.0],
        token_entropies=[0.5, 1.0],
        finish_reason="length",
        is_truncated=True,
        beam_score=None,
        matched_alias="bc",
        matched_alias_span=[1, 3],
        is_correct=True,
        correctness_rule="exact_match",
        exact_match=True,
        f1=1.0,
        samples=[
            SampledAnswer(
                sample_index=1,
                text="x",
                token_ids=[9],
                token_logprobs=[-2.0],
                finish_reason="stop",
                is_correct=False,
            )
        ],
    )
    return msgspec.structs.replace(record, **changes)
