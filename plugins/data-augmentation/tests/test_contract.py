from qpipe_data_augmentation import DataAugmentation

from qpipe.testing import check_plugin
from qpipe.testing.tiny import GOOD


def test_contract(tmp_path):
    pairs = tmp_path / "pairs.txt"
    pairs.write_text("".join(f"{one} {other}\n" for one in GOOD for other in GOOD if one < other))
    options = {"one_piece": "neighbours", "neighbours": "ppdb", "neighbours_from": str(pairs), "trials": 2}
    check_plugin(DataAugmentation, options=options)
