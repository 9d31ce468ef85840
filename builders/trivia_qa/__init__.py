"""TriviaQA: short factual questions with many accepted answers."""
