"""Tables of labels: which files of a folder are read with which label and source; every mistake a table can hold."""

from __future__ import annotations

import numpy
import pytest
import soundfile

from dslify.data import open_data
from dslify.errors import DataError
from dslify.listing import Row, read_table
from dslify.samples import split

SHAPE = (1, 800)  # 0.05 s at 16 kHz
FILES = ("no/a.wav", "no/b.wav", "yes/a.wav", "yes/b.wav")


@pytest.fixture
def folder(tmp_path):
    """Four recordings of two segments each."""
    root = tmp_path / "sounds"
    for at, name in enumerate(FILES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(root / name, numpy.full(1600, (at + 1) / 10), 16_000)
    return root


def opened(folder, **more):
    return open_data(folder, SHAPE, rate=16_000, **more)


def message(folder, **more) -> str:
    with pytest.raises(DataError) as caught:
        opened(folder, **more)
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def test_a_named_table_chooses_and_describes_files(folder, tmp_path):
    (tmp_path / "mine.csv").write_text("path,label,source\nyes/b.wav,up,ben\nno/a.wav,down,ben\nno/gone.wav,down,eve\n")
    samples = opened(folder, labels=tmp_path / "mine.csv")
    assert samples.labels == ("up", "up", "down", "down")
    assert set(samples.sources) == {"ben"}
    assert samples.classes == ("down", "up")
    assert samples.class_indices().tolist() == [1, 1, 0, 0]
    assert samples.report.skipped == (("no/gone.wav", "no such file"),)
    assert samples.report.notes == (
        f"labels and sources are from {tmp_path / 'mine.csv'}",
        "2 files are not listed in mine.csv and were left out",
    )


def test_a_table_of_several_folders_serves_each_of_them(folder):
    rows = "path;label\nsounds/no/a.wav;low\nsounds/yes/a.wav;high\nelsewhere/x.wav;low\n"
    (folder.parent / "all.csv").write_text(rows)
    samples = opened(folder / "yes", labels=str(folder.parent / "all.csv"))
    assert samples.names == ("a.wav[0]", "a.wav[1]")
    assert set(samples.labels) == {"high"}
    notes = samples.report.notes
    assert "1 files are not listed in all.csv and were left out" in notes
    assert samples.report.skipped == (("elsewhere/x.wav", "no such file"),)
    assert f"1 files that all.csv lists lie outside {folder / 'yes'} and were left out" in notes
    (folder.parent / "all.csv").write_text("path;label\nsounds/no/a.wav;low\n")
    assert f"lists no file of {folder / 'yes'}" in message(folder / "yes", labels=folder.parent / "all.csv")


@pytest.mark.parametrize("separator", [",", ";", "\t"], ids=["comma", "semicolon", "tab"])
def test_tables_as_other_programs_write_them(tmp_path, separator):
    lines = [' Path ,"LABEL",source_id', '"a, b.wav", yes ,x', "", ".\\no\\c.wav,no,", "./d.wav,,y", "a.wav"]
    if separator != ",":
        lines = [line.replace('"a, b.wav"', '"a, b.wav"'.replace(",", "\0")).replace(",", separator) for line in lines]
    text = "\r\n".join(lines).replace("\0", ",")
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_table(tmp_path / "t.csv") == {
        "a, b.wav": Row(2, "yes", "x"),
        "no/c.wav": Row(4, "no", ""),
        "d.wav": Row(5, "", "y"),
        "a.wav": Row(6, "", ""),
    }


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("", "has the columns none; a 'path' column is expected"),
        ("file,label\na,b\n", "has the columns file, label; a 'path' column is expected"),
        ("path\nno/a.wav\n", "has the columns path; a 'label' column is expected"),
        ("path,label\n", "lists no file; expected one row a file"),
        ("path,label,label\nno/a.wav,a,b\n", "has a column twice (path, label, label)"),
        ("path,label\nno/a.wav,a\n,b\n", "line 3 names no file"),
        ("path,label\nno/a.wav,a,b\n", "line 2 has 3 cells and the heading 2; put quotes"),
        ("path,label\nno/a.wav,a\nno/a.wav,b\n", "lists no/a.wav twice with other labels or sources, in lines 2 and 3"),
        ("path,label\nno/a.wav,a\nyes/../no/a.wav,b\n", "lists no/a.wav twice under other names, again in line 3"),
        ('path,label\n"no/a.wav,a\n', "cannot be read as a CSV table"),
        ("path,label\nno/a.wav,\xff\n", "cannot be read as a CSV table"),
        ("path,label\ngone.wav,a\nlost.wav,b\n", "all 2 were skipped, the first is gone.wav (no such file)"),
    ],
)
def test_every_mistake_is_told_in_one_sentence(folder, tmp_path, table, said):
    (tmp_path / "mine.csv").write_bytes(table.encode("latin-1"))
    assert said in message(folder, labels=tmp_path / "mine.csv")


def test_tables_that_are_not_there_or_belong_to_nothing(folder, tmp_path):
    assert "There is no table of labels" in message(folder, labels=tmp_path / "none.csv")
    for name in ("labels.csv", "manifest.csv"):
        (folder / name).write_text("path\nno/a.wav\n")
    assert "holds manifest.csv and labels.csv; keep one of them" in message(folder)
    assert opened(folder, labels=_table(tmp_path)).labels == ("x",) * 2
    assert "give its labels as a CSV table" in message(folder, labels=["a", "b"])
    numpy.save(tmp_path / "x.npy", numpy.zeros((2, 1, 800)))
    assert "holds arrays; give its labels as an array named labels" in message(
        tmp_path / "x.npy", labels=_table(tmp_path)
    )
    assert "belong to a folder of files" in message(numpy.zeros((2, 1, 800)), labels=_table(tmp_path))
    assert "does not list b.wav" in message(folder / "no" / "b.wav", labels=_table(tmp_path, "a.wav"))
    assert opened(folder / "no" / "a.wav", labels=_table(tmp_path, "a.wav")).labels == ("x", "x")


def _table(folder, path="no/a.wav"):
    (folder / "one.csv").write_text(f"path,label\n{path},x\n")
    return folder / "one.csv"


def test_rows_without_a_label_take_the_folder_s_name_and_it_is_said(folder):
    (folder / "labels.csv").write_text("path,label\nno/a.wav,\nyes/a.wav,da\n")
    samples = opened(folder)
    assert samples.labels == ("no", "no", "da", "da")
    assert "1 rows of labels.csv have no label, which is taken from the folder's name" in samples.report.notes


def test_segments_of_a_speaker_stay_in_one_part(folder):
    rows = [f"{name},{name[:2]},{'ann' if at in (0, 3) else f'other{at}'}" for at, name in enumerate(FILES)]
    (folder / "labels.csv").write_text("\n".join(["path,label,source", *rows]))
    for seed in range(5):
        parts = split(opened(folder), (0.5, 0.5), seed=seed)
        owned = [set(part.sources) for part in parts]
        assert not owned[0] & owned[1]
        assert sorted(name for part in parts for name in part.names) == sorted(opened(folder).names)


def test_links_to_folders_count_as_the_folder_that_they_stand_in(folder, tmp_path):
    (tmp_path / "linked").symlink_to(folder)
    (folder / "maybe").symlink_to(folder / "yes")
    (folder / "labels.csv").write_text("path,label\nmaybe/a.wav,m\nno/a.wav,n\n")
    for root in (folder, tmp_path / "linked"):
        assert opened(root, labels=folder / "labels.csv").labels == ("m", "m", "n", "n")
    (folder / "labels.csv").unlink()
    assert opened(tmp_path / "linked", labels=_table(tmp_path, "sounds/no/a.wav")).names == (
        "no/a.wav[0]",
        "no/a.wav[1]",
    )
