"""What a listener and the console say is what they were given."""

from pathlib import Path

import pytest

from segpipe.pipeline.progress import StageSums, show_summary, terminal, watching

NAMES = ("/data/north [cloudy]/t1.tif", "/data/[/2021]/t1.tif", "[red]", "/data/:fire:/t1.tif", "a\\[b]")


@pytest.mark.parametrize("name", NAMES)
def test_names_with_brackets_and_colons_are_said_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    console = terminal()
    console.print(name, soft_wrap=True)
    with watching(tmp_path, console) as listener:
        listener.say(name)
        listener.expect(name, 3)
        with listener.showing():
            pass
    show_summary(console, {name: StageSums()})
    first, second, line, *table = capsys.readouterr().err.splitlines()
    assert first == second == name
    assert line == f"{name} 0/3"
    assert any(name in row for row in table)
