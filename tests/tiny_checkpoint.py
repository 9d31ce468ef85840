"""A tiny random checkpoint with a real tokenizer, made on the spot: what tests run builders on without any download."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_TEXTS = [
    "Question: What is the capital of France?\nAnswer: Paris",
    "Who wrote Romeo and Juliet? William Shakespeare wrote it in London.",
    "The quick brown fox jumps over the lazy dog, 0123456789 times.",
]


def save_tiny_checkpoint(
    folder: Path, *, chat: bool = False, seed: int = 0, dtype: str = "float32", is_tied: bool = False
) -> Path:
    """Save a 2-layer grouped-query Llama and a byte-level BPE tokenizer; returns the folder."""
    tokenizer = tiny_tokenizer(chat=chat)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
        tie_word_embeddings=is_tied,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_gpt2(folder: Path, *, num_positions: int = 384) -> Path:
    """Save a tiny random GPT-2 (learned positions, LayerNorm, tied head) with that tokenizer; returns the folder."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=num_positions,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on three sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast
