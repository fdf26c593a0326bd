"""Runs with every built-in quantizer keep the contract of plugins: export, resume, ZeRO-3 on two processes."""

import pytest

from qpipe.host import load_plugins
from qpipe.testing import check_rules


def rule(site, quantizer, **options):
    return {"site": site, "quantizer": quantizer, "options": options}


STATIC = {"granularity": "tensor", "dynamic": False}

# Each at a site of its own, in one run: most of the time goes into starting processes.
FIRST = [
    rule("{block}.*query:weight", "lsq", bits=4),
    rule("{block}.*key:weight", "lsq", bits=2, granularity="tensor"),
    rule("{block}.*value:weight", "lsq+", bits=3, granularity="group", group_size=8),
    rule("{block}.attention.output.dense:weight", "lsq", bits=1, levels="mid-rise"),
    rule("{block}.intermediate.dense:weight", "laq", bits=3),
    rule("{block}.output.dense:weight", "uniform", bits=4, symmetric=False),
    rule("{embedding}:weight", "lsq", bits=8),
]
SECOND = [
    rule("{block}.*query:weight", "dorefa", bits=4),
    rule("{block}.*key:weight", "dorefa", bits=2, granularity="channel"),
    rule("{block}.*value:weight", "dorefa", bits=1),
    rule("{block}.attention.output.dense:weight", "binary"),
    rule("{block}.intermediate.dense:weight", "binary", granularity="group", group_size=16, keep_zeros=True),
    rule("{block}.output.dense:weight", "laq", bits=2, granularity="tensor"),
    rule("{embedding}:weight", "binary"),
    rule("{head}:weight", "uniform-static", bits=4, range="lp"),
]
ACTIVATIONS = [
    rule("{block}.*:weight", "lsq", bits=4),
    rule("{block}.*query:input", "lsq-activation", bits=4),
    rule("{block}.*key:input", "lsq+-activation", bits=4),
    rule("{block}.*value:input", "lsq+-activation", bits=4, signed=False, zero_point="integer"),
    rule(
        "{block}.attention.output.dense:input", "uniform-activation", granularity="tensor", dynamic=False, range="mse"
    ),
    rule("{block}.intermediate.dense:input", "lsq-activation", bits=8, init="min-max", lr_scale=0.1),
    rule("{block}.intermediate.dense:output", "dorefa-activation"),
    rule("{block}.output.dense:input", "pact", weight_decay=0.1),
    rule("{block}.output.dense:output", "affine-activation", init="running"),
]


@pytest.mark.distributed
@pytest.mark.parametrize("rules", [FIRST, SECOND, ACTIVATIONS], ids=["learned", "fixed", "activations"])
def test_contract(rules):
    check_rules(rules)


@pytest.mark.distributed
def test_native_holds_activations_too():
    check_rules(ACTIVATIONS, zero3=False, export__format="native")


def test_every_builtin_quantizer_is_checked():
    kinds = load_plugins({}).collect("qpipe_quantizers")
    assert set(kinds) == {r["quantizer"] for r in FIRST + SECOND + ACTIVATIONS}
