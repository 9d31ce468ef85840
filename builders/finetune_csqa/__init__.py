"""Fine-tuning an encoder on CommonsenseQA."""
