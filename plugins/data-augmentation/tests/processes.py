"""What several processes do in `test_determinism.py`."""

from pathlib import Path
from typing import Any

from qpipe_data_augmentation import DataAugmentation, DataAugmentationOptions

import qpipe
from qpipe.data.loading import find_task, load_data
from qpipe.engine import connect
from qpipe.host import load_plugins


def rows(source: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The augmented training data of a run, as every process sees them, and the files of each process."""
    config = qpipe.resolve(source)
    engine = connect(config.engine)
    task = find_task(load_plugins({}).collect("qpipe_tasks"), config.task)
    plugin = DataAugmentation(DataAugmentationOptions(**options))
    written: list[str] = []
    from qpipe_data_augmentation.blocks import Blocks

    write = Blocks.write

    def noted(self: Blocks, number: int, new: Any) -> None:
        write(self, number, new)
        written.append(self.paths[number].name)

    Blocks.write = noted  # type: ignore[method-assign]
    try:
        data = plugin.qpipe_training_data(config, task, load_data(config, task), engine)
    finally:
        Blocks.write = write  # type: ignore[method-assign]
    seen = engine.gather_objects([data.train["input_ids"][:], data.train["labels"][:], data.steps])
    return {"seen": seen, "written": engine.gather_objects(written), "folder": str(Path(config.out))}
