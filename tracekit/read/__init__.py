"""Reading a dataset, here or on the Hub: TraceStore, load_dataset, verify. Never imports torch unless asked to."""
