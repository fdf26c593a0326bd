"""What goes wrong on one process ends all of them with a message, and what they count apart is made one."""

import json
import socket
from pathlib import Path

import pytest

from qpipe.config import resolve
from qpipe.stages import checkpoint
from qpipe.testing import run_distributed, tiny_config, tiny_model
from qpipe.testing.tiny import tiny_images

pytestmark = pytest.mark.distributed
LIMIT = 150  # seconds; a hang would last until the process group's timeout of 30 minutes


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def engine(name, zero=1):
    return {"engine__name": name, **({"engine__zero": zero} if name == "deepspeed" else {})}


@pytest.mark.parametrize(("name", "zero"), [("accelerate", 1), ("deepspeed", 3)])
def test_a_non_finite_loss_on_one_rank_stops_all(tmp_path, name, zero):
    config = tiny_config(tmp_path, **engine(name, zero)).model_dump(mode="json")
    message = run_distributed("cases:nan_on_one_rank", timeout=LIMIT, config=config)
    assert "the loss is not finite at step 2 (rank 1; parts: poison); every module's output is finite" in message


def test_a_weight_that_is_read_outside_its_module_is_seen_where_it_is_partitioned(tmp_path):
    """DeepSpeed gathers it there too."""
    settings = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    (tmp_path / "zero3.json").write_text(json.dumps(settings))
    rules = [{"site": "{embedding}:weight", "quantizer": "uniform"}]
    changes = {"quantization__rules": rules, "engine__config_file": str(tmp_path / "zero3.json")}
    config = tiny_config(tmp_path, **engine("deepspeed", 3), **changes).model_dump(mode="json")
    message = run_distributed("cases:weight_read_outside", timeout=LIMIT, config=config)
    assert "computes with the weight of bert.embeddings.word_embeddings outside that module too (in matmul)" in message


def test_a_run_directory_that_processes_do_not_share_is_refused_by_all(tmp_path):
    """As on machines without common storage: the checkpoints of each would lack what the others wrote."""
    config = tiny_config(tmp_path, **engine("accelerate")).model_dump(mode="json")
    message = run_distributed("cases:another_directory_on_one_rank", timeout=LIMIT, config=config)
    assert f"{socket.gethostname()} cannot see what the first machine writes there" in message
    assert not list(tmp_path.glob("run-of-rank-*/*"))


def test_a_full_disk_on_one_rank_ends_the_run(tmp_path):
    config = tiny_config(tmp_path, **engine("deepspeed")).model_dump(mode="json")
    with pytest.raises(RuntimeError, match=r"cannot write to .*No space left on device.*was saved before is untouched"):
        run_distributed("cases:full_disk_on_one_rank", timeout=LIMIT, config=config)
    assert checkpoint.steps(tmp_path / "run") == [3]
    checkpoint.verify_files(tmp_path / "run" / "checkpoints" / "step-00000003")


def test_shards_of_a_model_with_unused_parameters_are_saved_and_loaded(tmp_path):
    whole, loaded = run_distributed("cases:shards_round_trip", timeout=LIMIT, folder=str(tmp_path / "shards"))
    assert whole == loaded


def test_batch_normalization_is_evaluated_with_one_set_of_statistics(tmp_path):
    config = {
        "model": {"name": str(tiny_model(tmp_path / "model", "resnet"))},
        "task": "image-classification",
        "data": {"train": str(tiny_images(tmp_path / "images.parquet")), "validation_fraction": 0.2},
        "quantization": {"rules": [{"site": "*convolution:weight", "options": {"bits": 4}}]},
        "train": {"max_steps": 2, "batch_size": 8, "learning_rate": 1e-3},
        "engine": {"name": "deepspeed", "precision": "float32", "cpu": True},
        "export": {"format": "native"},
        "out": str(tmp_path / "run"),
    }
    config = resolve(config).model_dump(mode="json")
    run_distributed("cases:running_statistics", timeout=LIMIT, config=config, folder=str(tmp_path))
    one, two = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert one and one == two
