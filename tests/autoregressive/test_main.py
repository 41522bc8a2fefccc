"""The one command over the scripts."""

import sys

import pytest

from autoregressive.__main__ import COMMANDS, main


def run(monkeypatch, *words) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["autoregressive", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.mark.parametrize("command", COMMANDS)
def test_command_with_help_prints_the_flags_of_its_script(command, monkeypatch, capsys):
    assert run(monkeypatch, *command.split(), "--help") == 0
    module = COMMANDS[command][0].rpartition(".")[2]
    assert capsys.readouterr().out.startswith(f"usage: {module}.py")


def test_unknown_command_is_refused_with_the_list(monkeypatch):
    assert "no command 'draw'" in (said := str(run(monkeypatch, "draw"))) and all(name in said for name in COMMANDS)


def test_no_command_lists_all(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["autoregressive"])
    main()
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in COMMANDS)
