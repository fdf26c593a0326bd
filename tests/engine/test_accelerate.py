"""What Accelerate and DDP are told, and what they say."""

import os
import subprocess
import sys

CODE = """
import sys, torch
from pathlib import Path
import torch.distributed as dist
from torch import nn
from qpipe.config import EngineConfig, TrainConfig
from qpipe.engine.accelerate import AccelerateEngine
from qpipe.engine.base import PATIENCE
from qpipe.errors import TrainingError

class Spare(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(4, 1), nn.Linear(4, 1)
    def forward(self, x):
        return self.used(x)

engine = AccelerateEngine(EngineConfig(cpu=True, precision="float32"))
assert engine.world_size == 2
group = dist.distributed_c10d._get_default_group()
same = group._get_backend(torch.device("cpu")).options._timeout == PATIENCE
message = "none"
model = Spare().train()
optimizer = torch.optim.SGD(model.parameters(), 0.1)
engine.wrap(model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), TrainConfig(batch_size=2))
try:
    for _ in range(2):
        engine.begin_micro_batch(True)
        engine.backward(engine.forward(x=torch.ones(1, 4)).sum())
        engine.step()
except TrainingError as error:
    message = str(error)
Path(sys.argv[1], str(engine.rank)).write_text(f"{same} {message}")
dist.destroy_process_group()
"""


def test_two_processes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(CODE)
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
        str(tmp_path),
    ]
    done = subprocess.run(words, env=os.environ, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        same, _, message = (tmp_path / str(rank)).read_text().partition(" ")
        assert same == "True", "processes wait for each other as long as with DeepSpeed"
        assert message.startswith("parameters of the model take no part in the loss, which DDP does not allow")
