"""Where the lines of a run go."""

import io
import logging
from contextlib import redirect_stdout

from tests.training import quiet_loggers
from utils.logger import console_logger
from utils.training.run_log import RunLogger


def test_lines_go_to_the_output_as_it_is_now():
    """A logger outlives what its output was when it was made: a notebook's cell, a test, a redirection."""
    first, second = io.StringIO(), io.StringIO()
    with quiet_loggers():
        logging.getLogger("run").handlers = []
        for output in (first, second):
            with redirect_stdout(output):
                console_logger().info("a line")
    for output in (first, second):
        assert output.getvalue().endswith("] a line\n") and output.getvalue().count("\n") == 1


def test_console_logger_escapes_file_names_that_are_not_utf8(capsys):
    """The same name in log.txt; no report of logging itself on the way."""
    with quiet_loggers():
        console_logger("escapes").warning("skipped %s", b"caf\xe9.png".decode(errors="surrogateescape"))
    printed = capsys.readouterr()
    assert printed.out.endswith("skipped caf\\udce9.png\n") and not printed.err


def test_log_file_on_a_full_disk_is_told_once_and_raises_nothing(tmp_path, capsys):
    with quiet_loggers():
        log = RunLogger(tmp_path)
        log.file.stream.close()
        log.file.stream = open("/dev/full", "w")  # noqa: SIM115, closed with the log
        for line in ("one", "two"):
            log.info(line)
        log.record("three")
        told = capsys.readouterr().err
        log.file.stream = open(tmp_path / "log.txt", "a")  # noqa: SIM115
        log.close()
    assert told.count("could not write to") == 1 and "Traceback" not in told
