"""CommonsenseQA for encoders with a multiple-choice head."""
