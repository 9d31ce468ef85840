"""Literal records for tests."""

from typing import Any

import msgspec

from builders.csqa.record import CsqaRecord
from builders.csqa_mcq.record import CsqaMcqRecord
from builders.degradation.record import DamageInfo, DegradationRecord
from builders.introspection.record import ConfidenceBin, IntrospectionRecord
from builders.kit.choices import Choice
from builders.next_token.record import NextTokenRecord, Word
from builders.nonsense_entities.record import NonsenseEntitiesRecord
from builders.replay.record import ReplayRecord
from builders.trivia_qa.record import TriviaQARecord
from builders.wiki_qa.record import WikiQARecord
from tracekit.records import SCHEMA_VERSION, GenerationSettings, Message, ModelInfo, Record, SampledAnswer, Span
from tracekit.serve.record import ServeRecord
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


def next_token_record(**changes: Any) -> NextTokenRecord:
    """One literal record of a text of three tokens, with changes."""
    common = msgspec.structs.asdict(trivia_record())
    record = NextTokenRecord(
        **{name.name: common[name.name] for name in msgspec.structs.fields(Record)}
        | {
            "prompt": "ab c",
            "prompt_length": 3,
            "token_offsets": [[0, 1], [1, 2], [2, 4]],
            "spans": [],
            "last_prompt_index": 2,
            "first_answer_index": None,
            "last_answer_index": None,
            "generation": GenerationSettings(
                do_sample=False, num_beams=1, max_new_tokens=0, temperature=1.0, top_p=1.0, top_k=0
            ),
        },
        text="ab c",
        kind="ud_ewt",
        document_id="s-1",
        window_index=0,
        window_start=0,
        num_context=0,
        num_document_tokens=3,
        num_layers=1,
        words=[
            Word(
                id="1",
                form="ab",
                lemma="ab",
                upos="NOUN",
                head=0,
                deprel="root",
                start_char=0,
                stop_char=2,
                start_token=0,
                stop_token=2,
            )
        ],
        labels=[],
        question=None,
        answer=None,
        next_pos=[0, 1],
        next_true_id=[2, 3],
        next_pred_id=[2, 9],
        next_correct=[True, False],
        next_true_prob=[0.5, 0.125],
        next_true_logprob=[-0.6931471805599453, -2.0794415416798357],
        next_pred_prob=[0.5, 0.25],
        next_entropy=[1.0, 1.5],
        next_topk_ids=[[2], [9]],
        next_topk_tokens=[["b"], ["x"]],
        next_topk_probs=[[0.5], [0.25]],
        num_scored=2,
        loss=1.3862943611198906,
        perplexity=4.0,
    )
    return msgspec.structs.replace(record, **changes)


def _options() -> dict[str, Any]:
    return {
        "question": "Where is a bed?",
        "concept": "bed",
        "choices": [Choice(label="A", text="in a room"), Choice(label="B", text="on the moon")],
        "label_idx": 0,
        "gold_label": "A",
        "pred_idx": 1,
        "pred_label": "B",
        "is_correct": False,
        "entropy": 0.5,
        "margin": 0.25,
        "num_layers": 2,
        "num_truncated": 0,
    }


def _shared(**changes: Any) -> dict[str, Any]:
    """The fields that every record has."""
    return {field: getattr(trivia_record(), field) for field in Record.__struct_fields__} | changes


def csqa_record(**changes: Any) -> CsqaRecord:
    """A question as a prompt."""
    scores: dict[str, Any] = {
        "letter_token_ids": [[1], [2]],
        "letter_logprobs": [-1.5, -0.5],
        "letter_probs": [0.25, 0.75],
        "text_token_ids": [[3, 4], [5]],
        "text_logprobs": [-3.0, -2.0],
        "text_logprobs_normalized": [-1.5, -2.0],
        "pred_idx_by_text": 0,
        "is_correct_by_text": True,
    }
    return CsqaRecord(**(_shared(config="csqa") | _options() | scores | changes))


def csqa_mcq_record(**changes: Any) -> CsqaMcqRecord:
    """A question for an encoder."""
    scores: dict[str, Any] = {
        "choice_offsets": [0, 2, 3],
        "choice_logits": [0.5, 1.5],
        "choice_probs": [0.25, 0.75],
        "is_head_fresh": True,
        "token_type_ids": [0, 1, 1],
    }
    return CsqaMcqRecord(**(_shared(config="csqa_mcq") | _options() | scores | changes))


def introspection_record(**changes: Any) -> IntrospectionRecord:
    """A question of two options in the pass `mcq`, answered wrongly."""
    fields: dict[str, Any] = {
        "prompt_type": "mcq",
        "question_text": "Where is a bed?",
        "subject": "home",
        "options": [Choice(label="A", text="in a room"), Choice(label="B", text="on the moon")],
        "option_order": [1, 0],
        "correct_answer_letter": "A",
        "model_name": "org/name",
        "checkpoint_id": "abc",
        "prompt_text": "Where is a bed?\nA. in a room\nB. on the moon",
        "instruction_sha256": "2" * 64,
        "bins": [],
        "temperature": 1.0,
        "top_p": 1.0,
        "max_new_tokens": 2,
        "output_text": "B.",
        "finish_reason": "length",
        "token_logprobs": [-0.5, -1.0],
        "token_entropies": [0.5, 1.0],
        "parsed_answer": "B",
        "parse_failure": None,
        "is_correct": False,
        "pred_letter": "B",
        "is_pred_correct": False,
        "answer_spelling": "A",
        "answer_scoring": "token",
        "answer_token_ids": [[1], [2]],
        "logits": [1.0, 2.0],
        "logprobs": [-2.0, -1.0],
        "probs": [0.25, 0.75],
        "allowed_mass": 0.5,
        "other_spelling_mass": 0.0,
        "entropy": 0.5625,
        "logit_margin": -1.0,
        "answer_token_index": 1,
        "confidence_token_index": None,
        "self_confidence": None,
        "other_confidence": None,
        "char_length": 15,
        "token_length": 4,
        "question_type": "where",
        "has_negation": False,
        "has_ambiguity": False,
        "token_rarity_mean": 10.0,
        "token_rarity_max": 20.0,
        "frequency_rarity_mean": 1.0,
        "frequency_rarity_max": 2.0,
        "frequency_rarity_source": "bpe_merge_rank",
        "num_layers": 2,
    }
    return IntrospectionRecord(**(_shared(config="mcq") | fields | changes))


def confidence_record(**changes: Any) -> IntrospectionRecord:
    """The same question in the pass `self_confidence`, with two bins."""
    bins = [ConfidenceBin(label=a, low=b, high=b + 50.0, midpoint=b + 25.0) for a, b in (("A", 0.0), ("B", 50.0))]
    fields: dict[str, Any] = {
        "config": "self_confidence",
        "prompt_type": "self_confidence",
        "bins": bins,
        "is_correct": None,
        "is_pred_correct": None,
        "logit_margin": None,
        "answer_token_index": None,
        "confidence_token_index": 1,
        "self_confidence": 62.5,
    }
    return introspection_record(**(fields | changes))


def degradation_record(**changes: Any) -> DegradationRecord:
    """An answer of a damaged model, one of whose tokens has no finite log-probability."""
    damage = DamageInfo(
        method="ablation",
        group="mlp:0-1",
        level=0.25,
        seed=3,
        num_weights=100,
        share_changed=0.25,
        relative_change=0.5,
        num_nonfinite=0,
        note=None,
    )
    fields: dict[str, Any] = {
        "prompt_id": "iq-logic-01",
        "prompt_group": "iq",
        "prompt_kind": "logic",
        "prompt_text": "Why?",
        "image_filename": None,
        "image_sha256": None,
        "config_name": "iq_it",
        "damage": damage,
        "level_index": 1,
        "repeat": 0,
        "generated_text": "B.",
        "generated_answer": "B.",
        "generated_token_ids": [2, 3],
        "finish_reason": "length",
        "is_truncated": True,
        "token_logprobs": [-0.5, None],
        "token_entropies": [0.5, None],
        "expected_answer": "because",
        "is_correct": False,
        "perplexity": None,
        "is_perplexity_finite": False,
        "num_nonfinite_values": 3,
        "num_overflowed_values": 2,
        "num_nonfinite_tokens": 1,
        "num_layers": 2,
    }
    return DegradationRecord(**(_shared(config="degradation") | fields | changes))


def wiki_record(**changes: Any) -> WikiQARecord:
    """A question about an article, and an answer without it."""
    fields: dict[str, Any] = {
        "question": "How many wells has Hem?",
        "generated_text": "Q Seven.",
        "generated_answer": "Seven.",
        "generated_token_ids": [2, 3],
        "num_layers": 2,
        "ground_truth_answers": ["seven"],
        "article_title": "Hem",
        "article_row": 3,
        "article_source": "articles.jsonl@sha256:0",
        "section_title": "",
        "section": "Hem has seven wells.",
        "section_num_tokens": 5,
        "difficulty": None,
        "question_model": "org/writer@abc",
        "question_prompts_sha256": "2" * 64,
        "token_logprobs": [-0.5, -1.5],
        "token_entropies": [0.5, 1.5],
        "finish_reason": "stop",
        "is_truncated": False,
    }
    return WikiQARecord(**(_shared(config="wiki_qa") | fields | changes))


def nonsense_entities_record(**changes: Any) -> NonsenseEntitiesRecord:
    """A question about an animal that there is not."""
    answered = trivia_record()
    names = ("generated_text", "generated_answer", "generated_token_ids", "num_layers", "token_logprobs")
    fields: dict[str, Any] = {name: getattr(answered, name) for name in (*names, "token_entropies", "finish_reason")}
    fields |= {
        "question": "What does Turdus chrysaetos mostly eat?",
        "domain": "animals",
        "name": "Turdus chrysaetos",
        "made_of": ["Turdus merula", "Aquila chrysaetos"],
        "name_group": "Aves",
        "wording_id": "diet",
        "is_invented": True,
        "is_truncated": True,
    }
    return NonsenseEntitiesRecord(**(_shared(config="nonsense_entities") | fields | changes))


def serve_record(**changes: Any) -> ServeRecord:
    """A chat request, answered up to a stop string."""
    fields: dict[str, Any] = {
        "endpoint": "chat",
        "messages": [Message(role="system", content="Be brief."), Message(role="user", content="Why?")],
        "generated_text": "Qbc",
        "generated_answer": "b",
        "generated_token_ids": [2, 3],
        "token_logprobs": [-0.5, -1.0],
        "token_entropies": [0.5, 1.0],
        "finish_reason": "stop",
        "stop_string": "c",
        "stop": ["c"],
        "request_seed": 7,
        "is_streamed": True,
        "is_truncated": False,
        "shard": 0,
        "num_layers": 1,
    }
    return ServeRecord(**(_shared(config="serve") | fields | changes))


def replay_record(**changes: Any) -> ReplayRecord:
    """An answer from elsewhere, given as text."""
    fields: dict[str, Any] = {
        "messages": [Message(role="user", content="Why?")],
        "question": None,
        "generated_text": "Q b c",
        "generated_answer": "b c",
        "generated_token_ids": [2, 3],
        "are_prompt_ids_given": False,
        "are_answer_ids_given": False,
        "source_model": "org/engine",
        "token_logprobs": [-0.5, -1.0],
        "token_entropies": [0.5, 1.0],
        "finish_reason": "unknown",
        "is_truncated": False,
        "num_layers": 1,
    }
    return ReplayRecord(**(_shared(config="replay") | fields | changes))


def record_of(task: str) -> Record:
    """A record of a task."""
    made = {
        "trivia_qa": trivia_record,
        "next_token": next_token_record,
        "csqa": csqa_record,
        "csqa_mcq": csqa_mcq_record,
        "introspection": introspection_record,
        "degradation": degradation_record,
        "wiki_qa": wiki_record,
        "nonsense_entities": nonsense_entities_record,
        "serve": serve_record,
        "replay": replay_record,
    }
    return made[task]()
