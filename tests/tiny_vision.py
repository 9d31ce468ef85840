"""Tiny random models that take pictures, with tokenizer and processor, made on the spot; and a picture."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.tiny_checkpoint import tiny_tokenizer

__all__ = ["draw_picture", "save_tiny_gemma3", "save_tiny_llava"]

_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 15,
}
_LIST_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}MARK{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tiny_llava(folder: Path) -> Path:
    """LLaVA: CLIP and Llama of two blocks each, four positions a picture; a template that knows texts alone."""
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION, image_size=30, projection_dim=32),
        text_config=LlamaConfig(**_TEXT, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}),
        tokenizer=tokenizer,
        patch_size=15,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    return folder


def save_tiny_gemma3(folder: Path) -> Path:
    """Gemma 3: SigLIP and Gemma; positions of a picture see one another; a template of parts."""
    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=marks,
    )
    tokenizer.chat_template = _LIST_TEMPLATE.replace("MARK", marks["boi_token"])
    torch.manual_seed(0)
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**_VISION, image_size=30).to_dict(),
        text_config=Gemma3TextConfig(**_TEXT, head_dim=8, vocab_size=len(tokenizer)).to_dict(),
        mm_tokens_per_image=4,
        image_token_index=tokenizer.convert_tokens_to_ids(marks["image_token"]),
        boi_token_index=tokenizer.convert_tokens_to_ids(marks["boi_token"]),
        eoi_token_index=tokenizer.convert_tokens_to_ids(marks["eoi_token"]),
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": 30, "width": 30}),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
        image_seq_length=4,
    )
    processor.save_pretrained(folder)
    return folder


def draw_picture(path: Path) -> Path:
    """A small drawing: a house, a sun."""
    image = Image.new("RGB", (60, 45), "white")
    pen = ImageDraw.Draw(image)
    pen.rectangle((10, 20, 30, 40), fill="brown")
    pen.polygon(((8, 20), (20, 8), (32, 20)), fill="red")
    pen.ellipse((42, 5, 55, 18), fill="yellow")
    image.save(path)
    return path
