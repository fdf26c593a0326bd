"""Which of several failures is the cause."""

import json
import signal

from qpipe.errors import ConfigError
from qpipe.launching import failures


def test_the_earliest_failure_is_reported(tmp_path):
    failures.record(tmp_path, 3, ConfigError("cause"))
    failures.record(tmp_path, 0, RuntimeError("Connection closed by peer"))
    assert failures.first(tmp_path).rank == 3
    assert str(failures.summarize(tmp_path, {0: 1, 3: 1, 1: -signal.SIGTERM})) == "rank 3: cause"


def test_a_rank_killed_from_outside_comes_before_what_others_report(tmp_path):
    failures.record(tmp_path, 0, RuntimeError("Connection closed by peer"))
    assert str(failures.summarize(tmp_path, {0: 1, 1: -signal.SIGKILL})).startswith("rank 1 was killed by SIGKILL")


def test_an_abort_comes_after_what_others_report_but_is_mentioned(tmp_path):
    failures.record(tmp_path, 0, ConfigError("cause"))
    error = failures.summarize(tmp_path, {0: 1, 1: -signal.SIGABRT})
    assert str(error) == "rank 0: cause" and error.__notes__ == ["rank 1 was killed by SIGABRT"]


def test_a_crash_is_named(tmp_path):
    assert "rank 1 was killed by SIGSEGV" in str(failures.summarize(tmp_path, {0: -signal.SIGTERM, 1: -signal.SIGSEGV}))


def test_exit_codes_are_named_where_nothing_else_is_known(tmp_path):
    assert "rank 2: 5" in str(failures.summarize(tmp_path, {2: 5}))


def test_the_file_holds_what_is_needed_to_find_the_cause(tmp_path):
    try:
        raise ConfigError("what")
    except ConfigError as error:
        error.add_note("who")
        path = failures.record(tmp_path, 1, error)
    content = json.loads(path.read_text())
    assert (content["rank"], content["message"], content["notes"], content["expected"]) == (1, "what", ["who"], True)
    assert "test_failures.py" in content["traceback"]
