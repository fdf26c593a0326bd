import pytest

from qpipe.cli import main
from qpipe.errors import ConfigError


def test_a_qpipe_error_is_one_message(cli, tmp_path):
    result = cli("launch", tmp_path / "absent.yaml")
    assert result.code == 1
    assert result.err.startswith("error: configuration ") and "absent.yaml' does not exist" in result.err
    assert "Traceback" not in result.err


def test_notes_are_part_of_the_message(cli, monkeypatch, config_file):
    def fail(*args, **kwargs):
        error = ConfigError("what went wrong")
        error.add_note("raised by plugin 'x' 1.0 in hook qpipe_losses")
        raise error

    monkeypatch.setattr("qpipe.launching.prepare.configuration", fail)
    result = cli("launch", config_file)
    assert result.err == "error: what went wrong\n  raised by plugin 'x' 1.0 in hook qpipe_losses\n"


def test_traceback_on_demand(monkeypatch, tmp_path):
    monkeypatch.setenv("QPIPE_TRACEBACK", "1")
    monkeypatch.setattr("sys.argv", ["qpipe", "launch", str(tmp_path / "absent.yaml")])
    with pytest.raises(ConfigError):
        main()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nonsense"], "No such command"),
        (["launch", "--gpus", "x"], "--gpus"),
        (["launch", "--zero", "4"], "--zero"),
        (["launch", "--gpus", "1", "--cpus", "1"], "not both"),
        (["launch", "--nodes", "2"], "--node-rank"),
        (["launch", "--nodes", "2", "--node-rank", "2", "--rendezvous", "a:1"], "has number 1"),
        (["launch", "--hostfile", "h", "--nodes", "2"], "--hostfile names the machines"),
        (["launch", "--engine", "accelerate", "--zero", "2"], "--zero belongs"),
        (["evaluate", "no-such-run"], "no-such-run"),
    ],
)
def test_wrong_usage_is_exit_code_2(cli, args, message):
    result = cli(*args)
    assert result.code == 2
    assert message in " ".join(result.err.split())
