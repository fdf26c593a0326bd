"""How much faster masks are predicted in batches than one by one: `python -m benchmarks.augmentation`.

Both ways take turns in one process: a seventh of the masks one by one, all of them in batches. A ratio of times per
mask is formed within each turn, for elapsed time and for the processor time of this process; the table gives the
medians. One by one is what TinyBERT's script does: a forward pass for each word, over one sentence, with the logits of
every token, of which those at the mask are sorted. Weights are random, as only their shape matters.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from qpipe_data_augmentation.masked import MaskedLM, Request
from qpipe_data_augmentation.words import Splitter, encode, replaceable
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from benchmarks.document import cpu_model
from qpipe import locate
from qpipe.config import default_recipe, resolve
from qpipe.data.loading import find_task, load_data
from qpipe.host import load_plugins

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512},
    "small": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
"""BERT-Tiny, the shape of the default recipe's encoder, and BERT-base."""


def masks(model: MaskedLM, sentences: Sequence[str]) -> list[Request]:
    """Every word of one token that would be replaced."""
    splitter, requests = Splitter.like(model.tokenizer), []
    for sentence in sentences:
        words = splitter.words(sentence)
        encoded = encode(model.tokenizer, words, model.limit)
        places = [p[0] for word, p in zip(words, encoded.places, strict=True) if replaceable(word) and len(p) == 1]
        requests += [Request(encoded, place) for place in places if place < len(encoded.ids)]
    return requests


def one_by_one(model: MaskedLM, requests: Sequence[Request], count: int) -> list[list[str]]:
    """The candidates as TinyBERT's script finds them."""
    found = []
    for request in requests:
        ids = torch.tensor([request.sentence.ids], device=model.device)
        ids[0, request.place] = model.tokenizer.mask_token_id
        types = torch.tensor([request.sentence.types], device=model.device)
        with torch.no_grad():
            logits = model.model(input_ids=ids, token_type_ids=types).logits[0, request.place]
        order = torch.argsort(logits, descending=True)[:count].tolist()
        found.append([t for t in model.tokenizer.convert_ids_to_tokens(order) if not t.startswith("##")])
    return found


def measure(model: MaskedLM, requests: Sequence[Request], turns: int) -> list[str]:
    """Masks per second of both, and the ratios of their times."""
    elapsed, processor, rates = [], [], []
    for turn in range(turns + 1):
        part = [requests[i] for i in range(turn % 7, len(requests), 7)]
        started = np.array([time.perf_counter(), time.process_time()])
        expected = one_by_one(model, part, 15)
        middle = np.array([time.perf_counter(), time.process_time()])
        found = model.candidates(requests, 15)[turn % 7 :: 7]
        ended = np.array([time.perf_counter(), time.process_time()])
        agree = sum(set(a) == set(b) for a, b in zip(expected, found, strict=True))
        assert agree >= 0.98 * len(part), f"only {agree} of {len(part)} masks have the same candidates"
        if turn:  # the first one warms up
            ratios = (middle - started) / len(part) * len(requests) / (ended - middle)
            elapsed.append(ratios[0])
            processor.append(ratios[1])
            rates.append((len(part) / (middle - started)[0], len(requests) / (ended - middle)[0]))
    slow, fast = (f"{statistics.median(side):.0f}" for side in zip(*rates, strict=True))
    return [slow, fast, f"{statistics.median(elapsed):.1f}", f"{statistics.median(processor):.1f}"]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", nargs="*", default=["tiny", "small"], choices=list(SIZES))
    parser.add_argument("--batch-size", type=int, default=64, help="masks per forward pass")
    parser.add_argument("--examples", type=int, default=140, help="sentences of the default recipe's data")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = resolve(default_recipe(), [f"data.max_train_examples={words.examples}"])
    task = find_task(load_plugins({}).collect("qpipe_tasks"), config.task)
    text = load_data(config, task).text
    assert text is not None
    sentences = text.split.data[text.columns[0]][:]
    tokenizer = AutoTokenizer.from_pretrained(locate(config.model.name))
    print("| model | masks | one by one, masks/s | batched, masks/s | ratio | of processor time |\n" + "|---" * 6 + "|")
    for size in words.sizes:
        lm = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **SIZES[size])).eval().to(device)
        model = MaskedLM(lm, tokenizer, 512, device, words.batch_size, special=True)
        requests = masks(model, sentences)
        row = [size, str(len(requests)), *measure(model, requests, words.turns)]
        print(f"| {' | '.join(row)} |", flush=True)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{cpu_model()}, {words.threads} threads"
    print(f"batches of {words.batch_size}; {where}; load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
