"""CommonsenseQA for decoders: questions as prompts, every option scored."""
