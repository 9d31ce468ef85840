"""WikiQA: questions that a model writes about articles, answered without them, and judged."""
