"""From names in the configuration to batches: where data are, how they are read, labelled, tokenized and batched."""
