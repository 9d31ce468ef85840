"""A server that answers as OpenAI's does, and logs what happened inside the model while it did."""
