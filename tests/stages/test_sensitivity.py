"""Loss increases against losses computed by hand, budgets against all plans, sizes against real exports."""

import itertools
import random

import pytest
import torch
import yaml

import qpipe
from qpipe import ConfigError
from qpipe.config import resolve
from qpipe.export.inspect import sizes
from qpipe.stages.budget import Budget, choose, costs, parse_budget, require_possible
from qpipe.stages.sensitivity import Choice, load, measure, rules, sample, together
from qpipe.stages.sizes import FixedSize, fixed_size, stored_sizes
from qpipe.testing import tiny_config

SITE = "bert.encoder.layer.0.output.dense:weight"


@pytest.fixture(scope="module")
def run(finished):
    return load(finished.out)


def plain_loss(run, weights):
    """Cross-entropy over the first 40 rows of the sample, by the plain model with some weights replaced."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(run.out / "model", attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, value in weights.items():
            model.get_parameter(name).copy_(value)
        losses = []
        for batch in sample(run, 40):
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
            losses.append(torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none"))
    return torch.cat(losses).double().mean().item()


def test_the_sample_is_cut_to_size_and_the_same_every_time(run):
    batches, again = sample(run, 40), sample(run, 40)
    assert [len(b["labels"]) for b in batches] == [16, 16, 8]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))
    assert sum(len(b["labels"]) for b in sample(run, 10_000)) == 128


def test_increases_are_those_of_one_weight_alone(run):
    found = measure(run, stored_sizes(run, (2, 4), [SITE]), 40)
    assert (found.examples, list(found.choices)) == (40, [SITE])
    assert found.loss == pytest.approx(plain_loss(run, {}), abs=1e-6)
    weight = run.student.get_parameter(SITE.replace(":", ".")).detach()
    for choice in found.choices[SITE]:
        top = 2 ** (choice.bits - 1) - 1
        scale = weight.abs().amax(1, keepdim=True) / top
        quantized = (weight / scale).round().clamp(-top - 1, top) * scale
        expected = plain_loss(run, {SITE.replace(":", "."): quantized}) - plain_loss(run, {})
        assert choice.increase == pytest.approx(expected, abs=2e-7) and choice.increase != 0
    assert together(run, [found.choices[SITE][0]], 40) == pytest.approx(found.choices[SITE][0].increase, abs=1e-9)


def table(seed, sites=6, widths=(2, 3, 4, 8)):
    rng = random.Random(seed)
    found = {}
    for number in range(sites):
        weights, scale = rng.randint(50, 2000), rng.random()
        found[str(number)] = tuple(
            Choice(str(number), bits, scale / 4**bits + rng.gauss(0, 0.01), bits * weights // 8 + 40) for bits in widths
        )
    return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 1.0])
def test_the_choice_is_the_best_of_all(seed, share):
    found = table(seed)
    ends = [[f(c.stored for c in choices) for choices in found.values()] for f in (min, max)]
    limit = sum(ends[0]) + share * (sum(ends[1]) - sum(ends[0]))
    chosen = choose(found, Budget((limit + 300) / 1e3, "kB"), FixedSize(50, 150, 100, 10_000))
    price = {(c.site, c.bits): cost for row in found.values() for c, cost in zip(row, costs(row), strict=True)}
    possible = (p for p in itertools.product(*found.values()) if sum(c.stored for c in p) <= limit + 1e-6)
    best = min(sum(price[c.site, c.bits] for c in plan) for plan in possible)
    assert [c.site for c in chosen] == list(found)
    assert sum(c.stored for c in chosen) <= limit + 1e-6
    assert sum(price[c.site, c.bits] for c in chosen) <= best + 1e-4 * max(price.values())


def test_costs_are_not_negative_and_do_not_grow_with_bits():
    row = [Choice("a", bits, value, bits) for bits, value in ((2, 0.5), (3, -0.1), (4, 0.2), (8, -0.3))]
    assert costs(row) == [0.5, 0.2, 0.2, 0.0]


def test_more_bits_where_they_cost_nothing():
    free = {"a": [Choice("a", bits, 0.0, 100 * bits) for bits in (2, 4, 8)]}
    assert [c.bits for c in choose(free, Budget(1.0, "kB"), FixedSize(0, 0, 0, 800))] == [8]
    assert [c.bits for c in choose(free, Budget(0.5, "kB"), FixedSize(0, 0, 0, 800))] == [4]


def test_an_impossible_budget_says_what_is_possible():
    fixed = FixedSize(200, 300, 100, 800)
    with pytest.raises(ConfigError, match=r"a budget of 2 bit cannot be met.*smallest possible .* is 3.000 bit"):
        require_possible([[200, 400]], Budget(2, "bit"), fixed)
    with pytest.raises(ConfigError, match=r"is 0.800 kB"):
        choose({"a": [Choice("a", 2, 0.0, 200)]}, Budget(0.7, "kB"), fixed)
    require_possible([[200, 400]], Budget(3, "bit"), fixed)


def test_budgets():
    assert parse_budget("3.2bit") == Budget(3.2, "bit") and parse_budget("3 bits") == Budget(3.0, "bit")
    assert parse_budget("12MB") == Budget(12.0, "MB") and parse_budget(".9 GB") == Budget(0.9, "GB")
    for text in ("3.2", "12mb", "-3bit", "bit", "3.2bit of"):
        with pytest.raises(ConfigError, match="such as 3.2bit, or a file size, such as 12MB"):
            parse_budget(text)


def plan_of(run, found, budget, path, format_name=None):
    fixed = fixed_size(run, found.choices, format_name)
    chosen = choose(found.choices, parse_budget(budget), fixed)
    path.write_text(yaml.safe_dump({"quantization": {"rules": rules(run, chosen)}}))
    stored = sum(choice.stored for choice in chosen)
    return chosen, 8 * (stored + fixed.quantized) / fixed.weights, stored + fixed.total


@pytest.mark.parametrize("format_name", ["compressed-tensors", "native"])
def test_a_plan_file_gives_a_file_of_the_predicted_size(tmp_path, fast, format_name):
    config = tiny_config(tmp_path, quantization__preset="w4", train__max_steps=1, export__format=format_name)
    run = load(config)
    found = measure(run, stored_sizes(run, (2, 3, 4, 8)), 32)
    path = tmp_path / "plan.yaml"
    chosen, bits, size = plan_of(run, found, "6bit", path)
    assert bits <= 6 and len({choice.bits for choice in chosen}) > 1
    planned = resolve(config.model_dump(), [f"quantization.plan={path}"])
    assert planned.quantization.plan is None
    done = qpipe.execute(planned)
    assert {n: e.bits for n, e in done.plan.sites.items()} == {choice.site: choice.bits for choice in chosen}
    real = sizes(done.out / "export")
    assert real["quantized_bits_per_weight"] == pytest.approx(bits, abs=1e-9)
    assert real["file_bytes"] <= size
    assert resolve(done.out / "config.yaml") == planned
