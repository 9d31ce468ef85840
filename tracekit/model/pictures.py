"""Pictures in prompts: a text and a picture in, ids and pixel values out, as the model's own processor makes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from tracekit.errors import ConfigError
from tracekit.model.answers import token_offsets
from tracekit.model.prompts import Prompt, Prompter
from tracekit.model.steps import ToAnswer

__all__ = ["Illustrated", "illustrate", "read_picture"]

_NOT_MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "num_crops")


class Illustrated(NamedTuple):
    """A prompt with a picture."""

    prompt: Prompt
    """The prompt; its text is what its ids decode to, one placeholder for each position that the picture takes."""
    inputs: Mapping[str, Tensor]
    """What the model takes beside the ids, such as `pixel_values` (1, C, H, W)."""
    token_type_ids: list[int] | None
    """Which tokens are the picture's, for models that want to know."""

    def to_answer(self, seed: str | None = None) -> ToAnswer:
        """The prompt as a model answers it, its draw decided by `seed`."""
        return ToAnswer(self.prompt.token_ids, seed, inputs=self.inputs, token_type_ids=self.token_type_ids)


def read_picture(path: str) -> Any:
    """A picture file as an RGB image of Pillow.

    Raises:
        ConfigError: it cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(Path(path).expanduser()) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ConfigError(f"image {path!r} - at `$.image`; cannot be read: {error}") from error


def illustrate(processor: Any, prompter: Prompter, text: str, picture: Any) -> Illustrated:
    """The prompt of a text and a picture before it.

    Raises:
        ConfigError: the processor has no place for a picture, or its chat template does not render.
    """
    rendered = prompter.render_with_picture(processor, text)
    encoded = processor(text=rendered, images=[picture], add_special_tokens=False, return_tensors="pt")
    ids: list[int] = encoded["input_ids"][0].tolist()
    tokenizer = processor.tokenizer
    prompt = prompter.prompt_of(text, tokenizer.decode(ids), ids, token_offsets(tokenizer, ids))
    types = encoded.get("token_type_ids")
    inputs = {name: value for name, value in encoded.items() if name not in _NOT_MODEL_INPUTS}
    if not inputs:
        raise ConfigError("the model's processor makes nothing of the picture; is it one for pictures?")
    return Illustrated(prompt, inputs, None if types is None else types[0].tolist())
