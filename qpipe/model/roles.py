"""What the activations of a transformer are called, whatever its family."""

from __future__ import annotations

from collections.abc import Mapping

ROLES: Mapping[str, str] = {
    "patch_embedding": "the patches of an image, each as a vector",
    "embedding_sum": "the sums of embeddings, in the order of addition",
    "embedding_output": "what the embeddings give to the first block, where no sum is it",
    "attention_input": "normalised input of attention (models that normalise first)",
    "query": "query, after rotation and normalisation where a model has them",
    "key": "key, likewise",
    "value": "value",
    "scores": "query times key, before scaling and mask",
    "probs": "attention probabilities, before dropout",
    "context": "probabilities times value, heads side by side",
    "attention_output": "output of attention's output projection",
    "attention_sum": "its sum with the residual",
    "ffn_input": "normalised input of the feed-forward network",
    "ffn_activation": "output of its activation function",
    "ffn_up": "output of the second projection of a gated network",
    "ffn_product": "product of the two",
    "ffn_output": "output of the feed-forward network",
    "ffn_sum": "its sum with the residual",
    "block_output": "normalised output of the block (models that normalise last)",
    "final_output": "normalised output of the last block (models that normalise first)",
    "pooler": "what stands between the blocks and the last map of the head",
    "logits": "output of the head",
}
"""Roles of activations, in the order of a forward pass. A model map gives the sites of those that its model has."""
