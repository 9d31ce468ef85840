"""Loads a tracekit dataset with `datasets`, tensors decoded, without tracekit. Needs datasets, numpy and safetensors.

Every dataset that tracekit writes holds a copy of this file with its own FINGERPRINT and DATASET filled in; tracekit's
own copy, where both are empty, loads nothing. On every version of `datasets`, run in the dataset's folder:

    from load_traces import LoadTraces
    builder = LoadTraces(config_name="capitals")          # base_path="hf://datasets/owner/name@v1.0.0": data from there
    builder.download_and_prepare()
    dataset = builder.as_dataset(split="validation").with_format("numpy")
    dataset[0]["hidden_states"]                           # (L, T, D)
    stream = builder.as_streaming_dataset(split="validation")

and on 2.x and 3.x also `load_dataset("<folder>/load_traces.py", "capitals", trust_remote_code=True)`.

Configurations: `<config>` has the record's fields and every tensor as columns, `<config>_records` the fields alone.

    data/<config>/<split>-00000.tar     <key>.json <key>.safetensors <key>.json <key>.safetensors ...
    records/<config>/<split>.tar        <key>.json <key>.json ...

Tensors are nested lists of their stored dtype, except bfloat16 and float8_e4m3fn, which Arrow does not have: they are
widened to float32, exactly. `with_format("numpy")` makes arrays of them, by its own default all float32 or int64;
`with_format("numpy", dtype=np.float16)` decides. Nothing is padded: T differs from row to row. Those of layout `scaled`
(int8 or float8) are multiplied with their scales, `<tensor>.scales` and `<tensor>.token_scales`, float32.

Attention with layout `causal` is stored packed (only the p+1 keys that query row p may look at, row after row) and
comes unpacked, (L, H, rows, T) with zeros above the diagonal; rows are the kept positions, all T of them unless the run
kept fewer. Layout `sparse` keeps the largest weights of each row alone and comes as (L, H, rows, T) with zeros for the
others. The record's `tensors` says which layers and positions each tensor has.

A sample of several choices (encoders on multiple-choice questions) has them one after the other along T, split at the
`choice_offsets` in `tensors`. Its attention comes as a list of choices, each (L, H, T_c, T_c): (C, L, H, T, T).

Every shard must hold as many samples as DATASET says, and nothing but samples; otherwise loading stops and names it.
"""

import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import datasets
import numpy as np
import safetensors

__all__ = [
    "DATASET",
    "FINGERPRINT",
    "LoadTraces",
    "decode_tensors",
    "split_choices",
    "spread",
    "unpack_causal",
    "upscale",
]

FINGERPRINT = "b6f188f2d13e78d449deb30aba2679f7ecabd8da98371f69aefa02542b1f662f"
"""SHA-256 over the dataset's manifests: part of the cache's path, so that no other dataset's rows are ever read."""

DATASET: dict[str, Any] = {
    "trivia_qa": {
        "splits": {
            "validation": [
                {
                    "path": "data/trivia_qa/validation-00000.tar",
                    "num_samples": 2,
                    "num_bytes": 41472
                },
                {
                    "path": "data/trivia_qa/validation-00001.tar",
                    "num_samples": 1,
                    "num_bytes": 20480
                }
            ]
        },
        "records": {
            "validation": [
                {
                    "path": "records/trivia_qa/validation.tar",
                    "num_samples": 3,
                    "num_bytes": 16384
                }
            ]
        },
        "features": {
            "task": "string",
            "schema_version": "string",
            "key": "string",
            "example_id": "string",
            "question_id": "string",
            "sample_index": "int64",
            "config": "string",
            "split": "string",
            "model": {
                "id": "string",
                "revision": "string",
                "variant": "string",
                "adapter": "string",
                "quantization": "string",
                "dtype": "string",
                "attention": "string"
            },
            "prompt": "string",
            "prompt_sha256": "string",
            "input_sha256": "string",
            "template_sha256": "string",
            "token_ids": [
                "int64"
            ],
            "tokens": [
                "string"
            ],
            "token_offsets": [
                [
                    "int64"
                ]
            ],
            "prompt_length": "int64",
            "spans": [
                {
                    "name": "string",
                    "start": "int64",
                    "stop": "int64"
                }
            ],
            "last_prompt_index": "int64",
            "first_answer_index": "int64",
            "last_answer_index": "int64",
            "eos_included": "bool",
            "tensors": [
                {
                    "name": "string",
                    "dtype": "string",
                    "shape": [
                        "int64"
                    ],
                    "axes": [
                        "string"
                    ],
                    "layers": [
                        "int64"
                    ],
                    "positions": [
                        [
                            "int64"
                        ]
                    ],
                    "layout": "string",
                    "num_keys": "int64",
                    "choice_offsets": [
                        "int64"
                    ]
                }
            ],
            "generation": {
                "do_sample": "bool",
                "num_beams": "int64",
                "max_new_tokens": "int64",
                "temperature": "float64",
                "top_p": "float64",
                "top_k": "int64"
            },
            "seed": "int64",
            "generated_text": "string",
            "generated_answer": "string",
            "generated_token_ids": [
                "int64"
            ],
            "token_logprobs": [
                "float64"
            ],
            "token_entropies": [
                "float64"
            ],
            "finish_reason": "string",
            "is_truncated": "bool",
            "num_layers": "int64",
            "beam_score": "float64",
            "samples": [
                {
                    "sample_index": "int64",
                    "text": "string",
                    "token_ids": [
                        "int64"
                    ],
                    "token_logprobs": [
                        "float64"
                    ],
                    "finish_reason": "string",
                    "is_correct": "bool"
                }
            ],
            "question": "string",
            "ground_truth_answers": [
                "string"
            ],
            "global_example_id": "int64",
            "shard": "int64",
            "index_in_shard": "int64",
            "matched_alias": "string",
            "matched_alias_span": [
                "int64"
            ],
            "is_correct": "bool",
            "correctness_rule": "string",
            "exact_match": "bool",
            "f1": "float64"
        },
        "tensors": [
            {
                "name": "hidden_states",
                "dtype": "float32",
                "axes": [
                    "L",
                    "T",
                    "D"
                ],
                "layout": "dense"
            },
            {
                "name": "attentions",
                "dtype": "float32",
                "axes": [
                    "L",
                    "H",
                    "S"
                ],
                "layout": "causal"
            },
            {
                "name": "topk_ids",
                "dtype": "int64",
                "axes": [
                    "T",
                    "k"
                ],
                "layout": "dense"
            },
            {
                "name": "topk_logprobs",
                "dtype": "float32",
                "axes": [
                    "T",
                    "k"
                ],
                "layout": "dense"
            }
        ]
    },
    "small": {
        "splits": {
            "validation": [
                {
                    "path": "data/small/validation-00000.tar",
                    "num_samples": 2,
                    "num_bytes": 23552
                }
            ]
        },
        "records": {
            "validation": [
                {
                    "path": "records/small/validation.tar",
                    "num_samples": 2,
                    "num_bytes": 12288
                }
            ]
        },
        "features": {
            "task": "string",
            "schema_version": "string",
            "key": "string",
            "example_id": "string",
            "question_id": "string",
            "sample_index": "int64",
            "config": "string",
            "split": "string",
            "model": {
                "id": "string",
                "revision": "string",
                "variant": "string",
                "adapter": "string",
                "quantization": "string",
                "dtype": "string",
                "attention": "string"
            },
            "prompt": "string",
            "prompt_sha256": "string",
            "input_sha256": "string",
            "template_sha256": "string",
            "token_ids": [
                "int64"
            ],
            "tokens": [
                "string"
            ],
            "token_offsets": [
                [
                    "int64"
                ]
            ],
            "prompt_length": "int64",
            "spans": [
                {
                    "name": "string",
                    "start": "int64",
                    "stop": "int64"
                }
            ],
            "last_prompt_index": "int64",
            "first_answer_index": "int64",
            "last_answer_index": "int64",
            "eos_included": "bool",
            "tensors": [
                {
                    "name": "string",
                    "dtype": "string",
                    "shape": [
                        "int64"
                    ],
                    "axes": [
                        "string"
                    ],
                    "layers": [
                        "int64"
                    ],
                    "positions": [
                        [
                            "int64"
                        ]
                    ],
                    "layout": "string",
                    "num_keys": "int64",
                    "choice_offsets": [
                        "int64"
                    ]
                }
            ],
            "generation": {
                "do_sample": "bool",
                "num_beams": "int64",
                "max_new_tokens": "int64",
                "temperature": "float64",
                "top_p": "float64",
                "top_k": "int64"
            },
            "seed": "int64",
            "generated_text": "string",
            "generated_answer": "string",
            "generated_token_ids": [
                "int64"
            ],
            "token_logprobs": [
                "float64"
            ],
            "token_entropies": [
                "float64"
            ],
            "finish_reason": "string",
            "is_truncated": "bool",
            "num_layers": "int64",
            "beam_score": "float64",
            "samples": [
                {
                    "sample_index": "int64",
                    "text": "string",
                    "token_ids": [
                        "int64"
                    ],
                    "token_logprobs": [
                        "float64"
                    ],
                    "finish_reason": "string",
                    "is_correct": "bool"
                }
            ],
            "question": "string",
            "ground_truth_answers": [
                "string"
            ],
            "global_example_id": "int64",
            "shard": "int64",
            "index_in_shard": "int64",
            "matched_alias": "string",
            "matched_alias_span": [
                "int64"
            ],
            "is_correct": "bool",
            "correctness_rule": "string",
            "exact_match": "bool",
            "f1": "float64"
        },
        "tensors": [
            {
                "name": "hidden_states",
                "dtype": "int8",
                "axes": [
                    "L",
                    "T",
                    "D"
                ],
                "layout": "scaled"
            },
            {
                "name": "attentions",
                "dtype": "float32",
                "axes": [
                    "W"
                ],
                "layout": "sparse"
            }
        ]
    },
    "csqa_mcq": {
        "splits": {
            "validation": [
                {
                    "path": "data/csqa_mcq/validation-00000.tar",
                    "num_samples": 1,
                    "num_bytes": 19968
                }
            ]
        },
        "records": {
            "validation": [
                {
                    "path": "records/csqa_mcq/validation.tar",
                    "num_samples": 1,
                    "num_bytes": 6144
                }
            ]
        },
        "features": {
            "task": "string",
            "schema_version": "string",
            "key": "string",
            "example_id": "string",
            "question_id": "string",
            "sample_index": "int64",
            "config": "string",
            "split": "string",
            "model": {
                "id": "string",
                "revision": "string",
                "variant": "string",
                "adapter": "string",
                "quantization": "string",
                "dtype": "string",
                "attention": "string"
            },
            "prompt": "string",
            "prompt_sha256": "string",
            "input_sha256": "string",
            "template_sha256": "string",
            "token_ids": [
                "int64"
            ],
            "tokens": [
                "string"
            ],
            "token_offsets": [
                [
                    "int64"
                ]
            ],
            "prompt_length": "int64",
            "spans": [
                {
                    "name": "string",
                    "start": "int64",
                    "stop": "int64"
                }
            ],
            "last_prompt_index": "int64",
            "first_answer_index": "int64",
            "last_answer_index": "int64",
            "eos_included": "bool",
            "tensors": [
                {
                    "name": "string",
                    "dtype": "string",
                    "shape": [
                        "int64"
                    ],
                    "axes": [
                        "string"
                    ],
                    "layers": [
                        "int64"
                    ],
                    "positions": [
                        [
                            "int64"
                        ]
                    ],
                    "layout": "string",
                    "num_keys": "int64",
                    "choice_offsets": [
                        "int64"
                    ]
                }
            ],
            "generation": {
                "do_sample": "bool",
                "num_beams": "int64",
                "max_new_tokens": "int64",
                "temperature": "float64",
                "top_p": "float64",
                "top_k": "int64"
            },
            "seed": "int64",
            "question": "string",
            "concept": "string",
            "choices": [
                {
                    "label": "string",
                    "text": "string"
                }
            ],
            "label_idx": "int64",
            "gold_label": "string",
            "pred_idx": "int64",
            "pred_label": "string",
            "is_correct": "bool",
            "entropy": "float64",
            "margin": "float64",
            "num_layers": "int64",
            "num_truncated": "int64",
            "choice_offsets": [
                "int64"
            ],
            "choice_logits": [
                "float64"
            ],
            "choice_probs": [
                "float64"
            ],
            "is_head_fresh": "bool",
            "token_type_ids": [
                "int64"
            ]
        },
        "tensors": [
            {
                "name": "hidden_states",
                "dtype": "float32",
                "axes": [
                    "L",
                    "T",
                    "D"
                ],
                "layout": "dense"
            }
        ]
    },
    "next_token": {
        "splits": {
            "validation": [
                {
                    "path": "data/next_token/validation-00000.tar",
                    "num_samples": 1,
                    "num_bytes": 13824
                }
            ]
        },
        "records": {
            "validation": [
                {
                    "path": "records/next_token/validation.tar",
                    "num_samples": 1,
                    "num_bytes": 12800
                }
            ]
        },
        "features": {
            "task": "string",
            "schema_version": "string",
            "key": "string",
            "example_id": "string",
            "question_id": "string",
            "sample_index": "int64",
            "config": "string",
            "split": "string",
            "model": {
                "id": "string",
                "revision": "string",
                "variant": "string",
                "adapter": "string",
                "quantization": "string",
                "dtype": "string",
                "attention": "string"
            },
            "prompt": "string",
            "prompt_sha256": "string",
            "input_sha256": "string",
            "template_sha256": "string",
            "token_ids": [
                "int64"
            ],
            "tokens": [
                "string"
            ],
            "token_offsets": [
                [
                    "int64"
                ]
            ],
            "prompt_length": "int64",
            "spans": [
                {
                    "name": "string",
                    "start": "int64",
                    "stop": "int64"
                }
            ],
            "last_prompt_index": "int64",
            "first_answer_index": "int64",
            "last_answer_index": "int64",
            "eos_included": "bool",
            "tensors": [
                {
                    "name": "string",
                    "dtype": "string",
                    "shape": [
                        "int64"
                    ],
                    "axes": [
                        "string"
                    ],
                    "layers": [
                        "int64"
                    ],
                    "positions": [
                        [
                            "int64"
                        ]
                    ],
                    "layout": "string",
                    "num_keys": "int64",
                    "choice_offsets": [
                        "int64"
                    ]
                }
            ],
            "generation": {
                "do_sample": "bool",
                "num_beams": "int64",
                "max_new_tokens": "int64",
                "temperature": "float64",
                "top_p": "float64",
                "top_k": "int64"
            },
            "seed": "int64",
            "text": "string",
            "kind": "string",
            "document_id": "string",
            "window_index": "int64",
            "window_start": "int64",
            "num_context": "int64",
            "num_document_tokens": "int64",
            "num_layers": "int64",
            "words": [
                {
                    "id": "string",
                    "form": "string",
                    "lemma": "string",
                    "upos": "string",
                    "head": "int64",
                    "deprel": "string",
                    "start_char": "int64",
                    "stop_char": "int64",
                    "start_token": "int64",
                    "stop_token": "int64"
                }
            ],
            "labels": [
                "string"
            ],
            "question": "string",
            "answer": "string",
            "next_pos": [
                "int64"
            ],
            "next_true_id": [
                "int64"
            ],
            "next_pred_id": [
                "int64"
            ],
            "next_correct": [
                "bool"
            ],
            "next_true_prob": [
                "float64"
            ],
            "next_true_logprob": [
                "float64"
            ],
            "next_pred_prob": [
                "float64"
            ],
            "next_entropy": [
                "float64"
            ],
            "next_topk_ids": [
                [
                    "int64"
                ]
            ],
            "next_topk_tokens": [
                [
                    "string"
                ]
            ],
            "next_topk_probs": [
                [
                    "float64"
                ]
            ],
            "num_scored": "int64",
            "loss": "float64",
            "perplexity": "float64"
        },
        "tensors": [
            {
                "name": "hidden_states",
                "dtype": "float32",
                "axes": [
                    "L",
                    "T",
                    "D"
                ],
                "layout": "dense"
            }
        ]
    },
    "mcq": {
        "splits": {
            "test": [
                {
                    "path": "data/mcq/test-00000.tar",
                    "num_samples": 1,
                    "num_bytes": 10240
                }
            ]
        },
        "records": {
            "test": [
                {
                    "path": "records/mcq/test.tar",
                    "num_samples": 1,
                    "num_bytes": 9216
                }
            ]
        },
        "features": {
            "task": "string",
            "schema_version": "string",
            "key": "string",
            "example_id": "string",
            "question_id": "string",
            "sample_index": "int64",
            "config": "string",
            "split": "string",
            "model": {
                "id": "string",
                "revision": "string",
                "variant": "string",
                "adapter": "string",
                "quantization": "string",
                "dtype": "string",
                "attention": "string"
            },
            "prompt": "string",
            "prompt_sha256": "string",
            "input_sha256": "string",
            "template_sha256": "string",
            "token_ids": [
                "int64"
            ],
            "tokens": [
                "string"
            ],
            "token_offsets": [
                [
                    "int64"
                ]
            ],
            "prompt_length": "int64",
            "spans": [
                {
                    "name": "string",
                    "start": "int64",
                    "stop": "int64"
                }
            ],
            "last_prompt_index": "int64",
            "first_answer_index": "int64",
            "last_answer_index": "int64",
            "eos_included": "bool",
            "tensors": [
                {
                    "name": "string",
                    "dtype": "string",
                    "shape": [
                        "int64"
                    ],
                    "axes": [
                        "string"
                    ],
                    "layers": [
                        "int64"
                    ],
                    "positions": [
                        [
                            "int64"
                        ]
                    ],
                    "layout": "string",
                    "num_keys": "int64",
                    "choice_offsets": [
                        "int64"
                    ]
                }
            ],
            "generation": {
                "do_sample": "bool",
                "num_beams": "int64",
                "max_new_tokens": "int64",
                "temperature": "float64",
                "top_p": "float64",
                "top_k": "int64"
            },
            "seed": "int64",
            "prompt_type": "string",
            "question_text": "string",
            "subject": "string",
            "options": [
                {
                    "label": "string",
                    "text": "string"
                }
            ],
            "option_order": [
                "int64"
            ],
            "correct_answer_letter": "string",
            "model_name": "string",
            "checkpoint_id": "string",
            "prompt_text": "string",
            "instruction_sha256": "string",
            "bins": [
                {
                    "label": "string",
                    "low": "float64",
                    "high": "float64",
                    "midpoint": "float64"
                }
            ],
            "temperature": "float64",
            "top_p": "float64",
            "max_new_tokens": "int64",
            "output_text": "string",
            "finish_reason": "string",
            "token_logprobs": [
                "float64"
            ],
            "token_entropies": [
                "float64"
            ],
            "parsed_answer": "string",
            "parse_failure": "string",
            "is_correct": "bool",
            "pred_letter": "string",
            "is_pred_correct": "bool",
            "answer_spelling": "string",
            "answer_scoring": "string",
            "answer_token_ids": [
                [
                    "int64"
                ]
            ],
            "logits": [
                "float64"
            ],
            "logprobs": [
                "float64"
            ],
            "probs": [
                "float64"
            ],
            "allowed_mass": "float64",
            "other_spelling_mass": "float64",
            "entropy": "float64",
            "logit_margin": "float64",
            "answer_token_index": "int64",
            "confidence_token_index": "int64",
            "self_confidence": "float64",
            "other_confidence": "float64",
            "char_length": "int64",
            "token_length": "int64",
            "question_type": "string",
            "has_negation": "bool",
            "has_ambiguity": "bool",
            "token_rarity_mean": "float64",
            "token_rarity_max": "float64",
            "frequency_rarity_mean": "float64",
            "frequency_rarity_max": "float64",
            "frequency_rarity_source": "string",
            "num_layers": "int64"
        },
        "tensors": [
            {
                "name": "hidden_states",
                "dtype": "float32",
                "axes": [
                    "L",
                    "T",
                    "D"
                ],
                "layout": "dense"
            }
        ]
    },
    "degradation": {
        "splits": {
            "validation": [
                {
                    "path": "data/degradation/validation-00000.tar",
                    "num_samples": 2,
                    "num_bytes": 10240
                }
            ]
        },
        "records": {
            "validation": [
                {
                    "path": "records/degradation/validation.tar",
                    "num_samples": 2,
                    "num_bytes": 8192
                }
            ]
        },
        "features": {
            "task": "string",
            "schema_version": "string",
            "key": "string",
            "example_id": "string",
            "question_id": "string",
            "sample_index": "int64",
            "config": "string",
            "split": "string",
            "model": {
                "id": "string",
                "revision": "string",
                "variant": "string",
                "adapter": "string",
                "quantization": "string",
                "dtype": "string",
                "attention": "string"
            },
            "prompt": "string",
            "prompt_sha256": "string",
            "input_sha256": "string",
            "template_sha256": "string",
            "token_ids": [
                "int64"
            ],
            "tokens": [
                "string"
            ],
            "token_offsets": [
                [
                    "int64"
                ]
            ],
            "prompt_length": "int64",
            "spans": [
                {
                    "name": "string",
                    "start": "int64",
                    "stop": "int64"
                }
            ],
            "last_prompt_index": "int64",
            "first_answer_index": "int64",
            "last_answer_index": "int64",
            "eos_included": "bool",
            "tensors": [
                {
                    "name": "string",
                    "dtype": "string",
                    "shape": [
                        "int64"
                    ],
                    "axes": [
                        "string"
                    ],
                    "layers": [
                        "int64"
                    ],
                    "positions": [
                        [
                            "int64"
                        ]
                    ],
                    "layout": "string",
                    "num_keys": "int64",
                    "choice_offsets": [
                        "int64"
                    ]
                }
            ],
            "generation": {
                "do_sample": "bool",
                "num_beams": "int64",
                "max_new_tokens": "int64",
                "temperature": "float64",
                "top_p": "float64",
                "top_k": "int64"
            },
            "seed": "int64",
            "generated_text": "string",
            "generated_answer": "string",
            "generated_token_ids": [
                "int64"
            ],
            "token_logprobs": [
                "float64"
            ],
            "token_entropies": [
                "float64"
            ],
            "finish_reason": "string",
            "is_truncated": "bool",
            "num_layers": "int64",
            "prompt_id": "string",
            "prompt_group": "string",
            "prompt_kind": "string",
            "prompt_text": "string",
            "image_filename": "string",
            "image_sha256": "string",
            "config_name": "string",
            "damage": {
                "method": "string",
                "group": "string",
                "level": "float64",
                "seed": "int64",
                "num_weights": "int64",
                "share_changed": "float64",
                "relative_change": "float64",
                "num_nonfinite": "int64",
                "note": "string"
            },
            "level_index": "int64",
            "repeat": "int64",
            "expected_answer": "string",
            "is_correct": "bool",
            "perplexity": "float64",
            "is_perplexity_finite": "bool",
            "num_nonfinite_values": "int64",
            "num_overflowed_values": "int64",
            "num_nonfinite_tokens": "int64"
        },
        "tensors": [
            {
                "name": "hidden_states",
                "dtype": "float32",
                "axes": [
                    "L",
                    "T",
                    "D"
                ],
                "layout": "dense"
            }
        ]
    },
    "nonsense_entities": {
        "splits": {
            "test": [
                {
                    "path": "data/nonsense_entities/test-00000.tar",
                    "num_samples": 1,
                    "num_bytes": 6144
                }
            ]
        },
        "records": {
            "test": [
                {
                    "path": "records/nonsense_entities/test.tar",
                    "num_samples": 1,
                    "num_bytes": 5120
                }
            ]
        },
        "features": {
            "task": "string",
            "schema_version": "string",
            "key": "string",
            "example_id": "string",
            "question_id": "string",
            "sample_index": "int64",
            "config": "string",
            "split": "string",
            "model": {
                "id": "string",
                "revision": "string",
                "variant": "string",
                "adapter": "string",
                "quantization": "string",
                "dtype": "string",
                "attention": "string"
            },
            "prompt": "string",
            "prompt_sha256": "string",
            "input_sha256": "string",
            "template_sha256": "string",
            "token_ids": [
                "int64"
            ],
            "tokens": [
                "string"
            ],
            "token_offsets": [
                [
                    "int64"
                ]
            ],
            "prompt_length": "int64",
            "spans": [
                {
                    "name": "string",
                    "start": "int64",
                    "stop": "int64"
                }
            ],
            "last_prompt_index": "int64",
            "first_answer_index": "int64",
            "last_answer_index": "int64",
            "eos_included": "bool",
            "tensors": [
                {
                    "name": "string",
                    "dtype": "string",
                    "shape": [
                        "int64"
                    ],
                    "axes": [
                        "string"
                    ],
                    "layers": [
                        "int64"
                    ],
                    "positions": [
                        [
                            "int64"
                        ]
                    ],
                    "layout": "string",
                    "num_keys": "int64",
                    "choice_offsets": [
                        "int64"
                    ]
                }
            ],
            "generation": {
                "do_sample": "bool",
                "num_beams": "int64",
                "max_new_tokens": "int64",
                "temperature": "float64",
                "top_p": "float64",
                "top_k": "int64"
            },
            "seed": "int64",
            "generated_text": "string",
            "generated_answer": "string",
            "generated_token_ids": [
                "int64"
            ],
            "token_logprobs": [
                "float64"
            ],
            "token_entropies": [
                "float64"
            ],
            "finish_reason": "string",
            "is_truncated": "bool",
            "num_layers": "int64",
            "beam_score": "float64",
            "samples": [
                {
                    "sample_index": "int64",
                    "text": "string",
                    "token_ids": [
                        "int64"
                    ],
                    "token_logprobs": [
                        "float64"
                    ],
                    "finish_reason": "string",
                    "is_correct": "bool"
                }
            ],
            "question": "string",
            "domain": "string",
            "name": "string",
            "made_of": [
                "string"
            ],
            "name_group": "string",
            "wording_id": "string",
            "is_invented": "bool"
        },
        "tensors": [
            {
                "name": "hidden_states",
                "dtype": "float32",
                "axes": [
                    "L",
                    "T",
                    "D"
                ],
                "layout": "dense"
            }
        ]
    },
    "serve": {
        "splits": {
            "train": [
                {
                    "path": "data/serve/train-00000.tar",
                    "num_samples": 1,
                    "num_bytes": 8192
                }
            ]
        },
        "records": {
            "train": [
                {
                    "path": "records/serve/train.tar",
                    "num_samples": 1,
                    "num_bytes": 3584
                }
            ]
        },
        "features": {
            "task": "string",
            "schema_version": "string",
            "key": "string",
            "example_id": "string",
            "question_id": "string",
            "sample_index": "int64",
            "config": "string",
            "split": "string",
            "model": {
                "id": "string",
                "revision": "string",
                "variant": "string",
                "adapter": "string",
                "quantization": "string",
                "dtype": "string",
                "attention": "string"
            },
            "prompt": "string",
            "prompt_sha256": "string",
            "input_sha256": "string",
            "template_sha256": "string",
            "token_ids": [
                "int64"
            ],
            "tokens": [
                "string"
            ],
            "token_offsets": [
                [
                    "int64"
                ]
            ],
            "prompt_length": "int64",
            "spans": [
                {
                    "name": "string",
                    "start": "int64",
                    "stop": "int64"
                }
            ],
            "last_prompt_index": "int64",
            "first_answer_index": "int64",
            "last_answer_index": "int64",
            "eos_included": "bool",
            "tensors": [
                {
                    "name": "string",
                    "dtype": "string",
                    "shape": [
                        "int64"
                    ],
                    "axes": [
                        "string"
                    ],
                    "layers": [
                        "int64"
                    ],
                    "positions": [
                        [
                            "int64"
                        ]
                    ],
                    "layout": "string",
                    "num_keys": "int64",
                    "choice_offsets": [
                        "int64"
                    ]
                }
            ],
            "generation": {
                "do_sample": "bool",
                "num_beams": "int64",
                "max_new_tokens": "int64",
                "temperature": "float64",
                "top_p": "float64",
                "top_k": "int64"
            },
            "seed": "int64",
            "generated_text": "string",
            "generated_answer": "string",
            "generated_token_ids": [
                "int64"
            ],
            "token_logprobs": [
                "float64"
            ],
            "token_entropies": [
                "float64"
            ],
            "finish_reason": "string",
            "is_truncated": "bool",
            "num_layers": "int64",
            "endpoint": "string",
            "messages": [
                {
                    "role": "string",
                    "content": "string"
                }
            ],
            "stop_string": "string",
            "stop": [
                "string"
            ],
            "request_seed": "int64",
            "is_streamed": "bool",
            "shard": "int64"
        },
        "tensors": [
            {
                "name": "hidden_states",
                "dtype": "float32",
                "axes": [
                    "L",
                    "T",
                    "D"
                ],
                "layout": "dense"
            }
        ]
    }
}
"""For each configuration: `splits` and `records` (shards of each split: path, num_samples, num_bytes), `features` (type
of each field of the record: name of a dtype, [type of the elements] or {name: type}) and `tensors` (name, dtype, axes
as stored, layout)."""

_VERSION = "1.0.0"  # part of the cache's path too: raise it when the same files would give other rows
_RECORDS = "_records"
_AGAIN = "Get the file again, and the load_traces.py of the same version"
_HERE = str(Path(__file__).absolute().parent)  # not resolved: in the Hub's cache this file is a link to another folder
_CODES = {
    "F64": "float64",
    "I64": "int64",
    "F32": "float32",
    "I32": "int32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I16": "int16",
    "U16": "uint16",
    "F8_E4M3": "float8_e4m3fn",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_WIDENED = {"bfloat16": "float32", "float8_e4m3fn": "float32"}


class LoadTraces(datasets.GeneratorBasedBuilder):
    """Builder of one configuration of this dataset, see the module's docstring.

    Args:
        cache_dir: Folder of the cache; None is the default of `datasets`.
        base_path: Folder or address of the dataset; None is the folder of this file.
        kwargs: Anything else that `datasets.DatasetBuilder` takes, as `config_name`.

    Raises:
        ValueError: this is tracekit's own copy of the file, or there is no such configuration; on loading: a shard is
            not what DATASET says.
    """

    BUILDER_CONFIGS = [  # noqa: RUF012 - the name and type that datasets wants
        datasets.BuilderConfig(name=name + suffix, version=datasets.Version(_VERSION))
        for name in DATASET
        for suffix in (_RECORDS, "")
    ]
    DEFAULT_CONFIG_NAME = (
        BUILDER_CONFIGS[0].name if BUILDER_CONFIGS else None
    )  # the records of the first, as in the card
    DEFAULT_WRITER_BATCH_SIZE = 4  # a sample may have hundreds of megabytes, and a list column ends at 2**31 values

    def __init__(self, cache_dir: str | None = None, *, base_path: str | None = None, **kwargs: Any) -> None:
        if not DATASET:
            raise ValueError(f"{__file__} describes no dataset; use the load_traces.py in the folder of a dataset")
        kwargs["hash"] = FINGERPRINT  # or the cache of another dataset with this script would be read
        root = base_path or _HERE
        super().__init__(cache_dir, base_path=root if "://" in root else str(Path(root).absolute()), **kwargs)

    def _info(self) -> datasets.DatasetInfo:
        entry, has_tensors = self._entry()
        features = {name: _feature(kind) for name, kind in entry["features"].items()}
        lines = ["Activation traces, made by tracekit."]
        for tensor in entry["tensors"] if has_tensors else []:
            feature: Any = datasets.Value(_dtype(tensor))
            axes = _axes(tensor)
            for _ in axes:
                feature = [feature]
            features[tensor["name"]] = feature
            widened = f", widened from {tensor['dtype']}" if tensor["dtype"] in _WIDENED else ""
            unpacked = ", unpacked from the causal half" if tensor["layout"] == "causal" else ""
            unpacked += ", a list of choices" if _is_by_choice(tensor) else ""
            unpacked += ", 0 where no weight was kept" if tensor["layout"] == "sparse" else ""
            unpacked += ", multiplied with its scales" if tensor["layout"] == "scaled" else ""
            lines.append(f"{tensor['name']}: ({', '.join(axes)}){widened}{unpacked}")
        return datasets.DatasetInfo(description="\n".join(lines), features=datasets.Features(features))

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        entry, has_tensors = self._entry()
        generators = []
        for split, shards in entry["splits" if has_tensors else "records"].items():
            files = dl_manager.download([shard["path"] for shard in shards])
            if not dl_manager.is_streaming:
                for shard, file in zip(shards, files, strict=True):
                    _check_size(shard, Path(file))
            archives = [dl_manager.iter_archive(file) for file in files]
            # lists of one length: what datasets hands out to several processes
            kwargs = {"shards": list(shards), "archives": archives}
            generators.append(datasets.SplitGenerator(name=split, gen_kwargs=kwargs))
        return generators

    def _generate_examples(  # pyright: ignore[reportIncompatibleMethodOverride] - named as in gen_kwargs
        self, shards: list[dict[str, Any]], archives: list[Iterable[tuple[str, IO[bytes]]]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        entry, has_tensors = self._entry()
        for shard, archive in zip(shards, archives, strict=True):
            path, num_samples = shard["path"], 0
            try:
                for key, record, payload in _samples(archive, path, has_tensors=has_tensors):
                    where = f"{path}: sample {key!r}"
                    row = _check_record(record, key, entry["features"], where)
                    if has_tensors:
                        arrays = _stored_tensors(payload, where)
                        row |= _columns(arrays, row["tensors"], entry["tensors"], len(row["token_ids"]), where)
                    num_samples += 1
                    yield key, row
            except tarfile.TarError as error:
                raise ValueError(f"{path} cannot be read after {num_samples} samples: {error}. {_AGAIN}") from error
            if num_samples != shard["num_samples"]:
                raise ValueError(f"{path} holds {num_samples} samples, expected {shard['num_samples']}. {_AGAIN}")

    def _entry(self) -> tuple[dict[str, Any], bool]:
        """What DATASET says of this configuration, and whether it has tensors."""
        name = self.config.name
        return (DATASET[name], True) if name in DATASET else (DATASET[name.removesuffix(_RECORDS)], False)


def decode_tensors(payload: bytes, *, where: str = "payload") -> dict[str, np.ndarray]:
    """Every tensor of a safetensors payload as an array: bfloat16 widened to float32, few bits multiplied with their
    scales. Attention stays packed: `unpack_causal`, `spread` and `split_choices` undo that.

    Raises:
        ValueError: the payload is damaged, or holds a dtype that tracekit does not write.
    """
    arrays = _stored_tensors(payload, where)
    for name in [name for name in arrays if {f"{name}.scales", f"{name}.token_scales"} <= set(arrays)]:
        scales, token_scales = arrays.pop(f"{name}.scales"), arrays.pop(f"{name}.token_scales")
        try:
            arrays[name] = upscale(arrays[name], scales, token_scales)
        except ValueError as error:
            raise ValueError(f"{where}: {name} has {error}. {_AGAIN}") from error
    return arrays


def _stored_tensors(payload: bytes, where: str) -> dict[str, np.ndarray]:
    """Every tensor as it is stored, bfloat16 and float8_e4m3fn widened to float32."""
    try:
        entries = safetensors.deserialize(payload)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{where}: the tensors cannot be read: {error}. {_AGAIN}") from error
    arrays = {}
    for name, entry in entries:
        dtype = _CODES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(
                f"{where}: tensor {name!r} has dtype {entry['dtype']!r}, expected one of {', '.join(_CODES)}"
            )
        arrays[name] = _flat(entry["data"], dtype).reshape(entry["shape"])
    return arrays


def unpack_causal(packed: np.ndarray, rows: np.ndarray, num_keys: int) -> np.ndarray:
    """Attention stored as its causal half, (..., S), as (..., len(rows), num_keys) with zeros above the diagonal.

    Raises:
        ValueError: S is not what these query rows need.
    """
    is_stored = np.arange(num_keys) <= rows[:, None]
    if packed.shape[-1] != is_stored.sum():
        raise ValueError(f"{packed.shape[-1]} packed values, expected {is_stored.sum()} for {len(rows)} query rows")
    full = np.zeros((*packed.shape[:-1], *is_stored.shape), packed.dtype)
    full[..., is_stored] = packed
    return full


def split_choices(packed: np.ndarray, offsets: list[int]) -> list[np.ndarray]:
    """Attention of several choices, (..., S), as one array (..., T_c, T_c) a choice; choice c starts at `offsets[c]`.

    Raises:
        ValueError: S is not what these choices need.
    """
    lengths = np.diff(offsets)
    stops = np.cumsum(lengths**2)
    if not len(stops) or packed.shape[-1] != stops[-1]:
        raise ValueError(f"{packed.shape[-1]} packed values, expected {(lengths**2).sum()} for choices at {offsets}")
    parts = np.split(packed, stops[:-1], axis=-1)
    return [part.reshape(*part.shape[:-1], n, n) for part, n in zip(parts, lengths.tolist(), strict=True)]


def upscale(values: np.ndarray, scales: np.ndarray, token_scales: np.ndarray) -> np.ndarray:
    """Values of few bits (..., T, D) times the scales of their channels (..., D) and tokens (..., T), float32.

    Raises:
        ValueError: the scales are not those of these values.
    """
    expected = (*values.shape[:-2], *values.shape[-1:]), values.shape[:-1]
    kinds = {scales.dtype, token_scales.dtype}
    if values.ndim < 2 or (scales.shape, token_scales.shape) != expected or kinds != {np.dtype(np.float32)}:
        raise ValueError(f"scales {scales.shape} and {token_scales.shape} of values {values.shape}")
    return values.astype(np.float32) * scales[..., None, :] * token_scales[..., None]


def spread(weights: np.ndarray, indices: np.ndarray, counts: np.ndarray, num_keys: int) -> np.ndarray:
    """Sparse attention, its kept weights row after row, as (..., num_keys) with zeros where none was kept.

    Raises:
        ValueError: weights, keys and counts do not go together.
    """
    kinds = {indices.dtype, counts.dtype}
    if kinds != {np.dtype(np.uint16)} or indices.ndim != 1 or weights.ndim != 1:
        raise ValueError(f"keys {indices.dtype} and counts {counts.dtype}, expected uint16")
    if not len(weights) == len(indices) == counts.sum() or (len(indices) and indices.max() >= num_keys):
        raise ValueError(f"{len(weights)} weights, {len(indices)} keys, {counts.sum()} counted, of {num_keys} tokens")
    full = np.zeros((counts.size, num_keys), weights.dtype)
    full[np.repeat(np.arange(counts.size), counts.ravel()), indices] = weights
    return full.reshape(*counts.shape, num_keys)


def _flat(data: bytes, dtype: str) -> np.ndarray:
    """Values of one tensor, widened where numpy does not have the dtype."""
    if dtype == "bfloat16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype == "float8_e4m3fn":
        return _FLOAT8[np.frombuffer(data, np.uint8)]
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<"))


def _float8_values() -> np.ndarray:
    """The float32 of every float8_e4m3fn: sign, 4 bits of exponent (bias 7), 3 of mantissa; all ones is NaN."""
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    values = np.where(exponent, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    values[bits & 127 == 127] = np.nan
    return np.where(bits & 128, -values, values).astype(np.float32)


_FLOAT8 = _float8_values()


def _feature(kind: Any) -> Any:
    """A feature from its plain notation. Lists stay plain lists: `Sequence` would turn structs inside out."""
    if isinstance(kind, list):
        return [_feature(kind[0])]
    if isinstance(kind, dict):
        return {name: _feature(inner) for name, inner in kind.items()}
    return datasets.Value(kind)


def _axes(tensor: dict[str, Any]) -> list[str]:
    """Axes of a tensor's column: as stored, but attention unpacked."""
    if _is_by_choice(tensor):
        return ["C", *tensor["axes"][:-1], "T", "T"]
    if tensor["layout"] == "sparse":
        return ["L", "H", "rows", "T"]
    return [*tensor["axes"][:-1], "rows", "T"] if tensor["layout"] == "causal" else tensor["axes"]


def _belonging(tensor: dict[str, Any]) -> list[str]:
    """Names of the tensors that one is unpacked with."""
    suffixes = {"scaled": ("scales", "token_scales"), "sparse": ("indices", "counts")}.get(tensor["layout"], ())
    return [f"{tensor['name']}.{suffix}" for suffix in suffixes]


def _is_by_choice(tensor: dict[str, Any]) -> bool:
    """Whether a tensor is the attention of several choices, one after the other."""
    return tensor["layout"] == "full" and tensor["axes"][-1] == "S"


def _dtype(tensor: dict[str, Any]) -> str:
    """dtype of a tensor's column."""
    name: str = tensor["dtype"]
    return "float32" if tensor["layout"] == "scaled" else _WIDENED.get(name, name)


def _check_size(shard: dict[str, Any], file: Path) -> None:
    """Raise ValueError where a file that is here has not the size it should have."""
    num_bytes = file.stat().st_size
    if num_bytes != shard["num_bytes"]:
        raise ValueError(f"{shard['path']} has {num_bytes} bytes, expected {shard['num_bytes']}. {_AGAIN}")


def _samples(
    archive: Iterable[tuple[str, IO[bytes]]], path: str, *, has_tensors: bool
) -> Iterator[tuple[str, bytes, bytes]]:
    """Key, record and tensors (empty without) of each sample of a tar."""
    members = iter(archive)
    for name, file in members:
        key, dot, suffix = name.partition(".")
        if dot + suffix != ".json":
            raise ValueError(f"{path}: found member {name!r}, expected the record of a sample, <key>.json. {_AGAIN}")
        record, payload = file.read(), b""
        if has_tensors:
            name, file = next(members, ("the end", None))
            if file is None or name != f"{key}.safetensors":
                raise ValueError(f"{path}: found {name!r} after '{key}.json', expected '{key}.safetensors'. {_AGAIN}")
            payload = file.read()
        yield key, record, payload


def _check_record(data: bytes, key: str, features: dict[str, Any], where: str) -> dict[str, Any]:
    """A record that has exactly the declared fields: datasets would drop others, and fill in missing ones, silently."""
    try:
        record = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{where}: the record is not JSON: {error}. {_AGAIN}") from error
    different = sorted(set(record) ^ set(features))
    if different:
        raise ValueError(
            f"{where}: the fields {', '.join(different)} are only in the record or only in DATASET. {_AGAIN}"
        )
    if record["key"] != key:
        raise ValueError(f"{where}: the record's key is {record['key']!r}. {_AGAIN}")
    return record


def _columns(
    arrays: dict[str, np.ndarray],
    specs: list[dict[str, Any]],
    declared: list[dict[str, Any]],
    num_tokens: int,
    where: str,
) -> dict[str, Any]:
    """The declared tensors of a sample, attention unpacked; None for one that this sample does not have."""
    spec_of = {spec["name"]: spec for spec in specs}
    names = {tensor["name"] for tensor in declared}
    if set(arrays) != set(spec_of) or not names.issuperset(name for name in arrays if not _is_companion(name)):
        raise ValueError(
            f"{where}: the payload holds {sorted(arrays)}, the record names {sorted(spec_of)}, "
            f"DATASET {sorted(names)}. {_AGAIN}"
        )
    return {
        tensor["name"]: _column(arrays, spec_of[tensor["name"]], tensor, num_tokens, where)
        if tensor["name"] in arrays
        else None
        for tensor in declared
    }


def _is_companion(name: str) -> bool:
    """Whether a tensor only belongs to another one, as `keys.scales` and `keys.12.scales` do; `keys.12` does not."""
    owner, _, suffix = name.rpartition(".")
    return bool(owner) and not suffix.isdecimal()


def _column(
    arrays: dict[str, np.ndarray], spec: dict[str, Any], tensor: dict[str, Any], num_tokens: int, where: str
) -> Any:
    """One tensor as it stands in its column: attention unpacked, or of several choices a list; scaled."""
    name = tensor["name"]
    array, missing = arrays[name], [one for one in _belonging(tensor) if one not in arrays]
    if missing:
        raise ValueError(f"{where}: {name} cannot be read without {', '.join(missing)}. {_AGAIN}")
    belonging = [arrays[one] for one in _belonging(tensor)]
    try:
        if tensor["layout"] == "scaled":
            array = upscale(array, belonging[0], belonging[1])
        if tensor["layout"] == "sparse":
            num_rows = sum(stop - start for start, stop in spec["positions"])
            if spec["num_keys"] != num_tokens or belonging[1].ndim != 3 or belonging[1].shape[2] != num_rows:
                shape = belonging[1].shape
                raise ValueError(
                    f"{spec['num_keys']} keys and counts {shape}, for {num_rows} rows of {num_tokens} tokens"
                )
            array = spread(array, belonging[0], belonging[1], num_tokens)
        if tensor["layout"] == "causal":
            # looked at first: a damaged record must not make us build something huge
            is_inside = all(0 <= start < stop <= num_tokens for start, stop in spec["positions"])
            if not is_inside or spec["num_keys"] != num_tokens:
                raise ValueError(
                    f"positions {spec['positions']} of {spec['num_keys']} keys, in a text of {num_tokens} tokens"
                )
            ranges = [np.arange(start, stop) for start, stop in spec["positions"]]
            array = unpack_causal(array, np.concatenate([np.arange(0), *ranges]), spec["num_keys"])
        choices = split_choices(array, spec["choice_offsets"]) if _is_by_choice(tensor) else None
    except ValueError as error:
        raise ValueError(f"{where}: {name} has {error}. {_AGAIN}") from error
    axes = _axes(tensor)
    num_axes = array.ndim if choices is None else choices[0].ndim + 1
    if num_axes != len(axes) or array.dtype != _dtype(tensor):
        expected = f"{_dtype(tensor)} with axes ({', '.join(axes)})"
        raise ValueError(f"{where}: {name} is {array.dtype} {array.shape}, expected {expected}. {_AGAIN}")
    return array if choices is None else choices
