"""Tables of images and labels, as Kaggle, Excel and pandas write them."""

import itertools
from pathlib import Path

import pytest

from rft_cluster.common.errors import UserError
from rft_cluster.config import DataSection
from rft_cluster.data import FewShotDataset, load_dataset
from tests.unit.data.test_layouts import put

COUNT = 16


def label(i: int) -> str:
    return "rose" if i % 2 else "tulip"


def pictures(folder: Path, count: int = COUNT, start: int = 0) -> None:
    for i in range(count):
        put(folder / f"{i:02d}.jpg", start + i)


def load(path: Path, **values) -> FewShotDataset:
    return load_dataset(
        DataSection(**{"source": "csv", "path": path, "shots": 2, "validation": 2, "test": 4, **values}), 0
    )


def refusal(path: Path, **values) -> str:
    with pytest.raises(UserError) as caught:
        load(path, **values)
    return str(caught.value)


def write(root: Path, lines: list[str], name: str = "train.csv") -> Path:
    (root / name).write_text("\n".join(lines) + "\n")
    return root


def right(dataset: FewShotDataset) -> bool:
    examples = [e for split in dataset.splits.values() for e in split]
    return len(examples) == 10 and all(e.label == label(int(Path(e.example_id).stem)) for e in examples)


HEADERS = {"image,label": "{i}{suffix},{label}", "id,breed": "{i}{suffix},{label}", "": "{i}{suffix},{label}"}
HEADERS |= {",filename,class": "9{i},{i}{suffix},{label}", "species;note;path": "{label};x{i};{i}{suffix}"}


@pytest.mark.parametrize("folder", ["", "images", "a/b c"])
@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("suffix", [".jpg", ""])
def test_every_form_gives_the_same_images(tmp_path, folder, header, suffix):
    pictures(tmp_path / folder)
    forms = itertools.product(("utf-8", "utf-8-sig", "utf-16"), ("\n", "\r\n"), (",", ";", "\t"), (False, True))
    row = HEADERS[header]
    tried = list(forms)[len(folder + header + suffix) % 5 :: 5]  # every form is tried with one of the others
    for encoding, end, delimiter, quoted in tried:
        rows = [row.format(i=f"{i:02d}", suffix=suffix, label=label(i)) for i in range(COUNT)]
        cells = [line.replace(";", ",").split(",") for line in ([header] if header else []) + rows]
        cells += [[""], ["", "", ""]]  # empty lines at the end
        text = end.join(delimiter.join(f'"{c}"' if quoted and c else c for c in line) for line in cells)
        (tmp_path / "train.csv").write_bytes(text.encode(encoding))
        assert right(load(tmp_path)), text


def test_paths_in_the_table_may_be_of_windows_and_lead_nowhere_else(tmp_path):
    pictures(tmp_path / "set/images")
    put(tmp_path / "secret.jpg", 999)
    good = [f"images\\{i:02d}.jpg,{label(i)}" for i in range(COUNT)]
    assert right(load(write(tmp_path / "set", ["image,label", *good])))
    for wrong in ("../secret.jpg", str(tmp_path / "secret.jpg"), "images/../../secret.jpg"):
        message = refusal(write(tmp_path / "set", ["image,label", *good, f"{wrong},rose"]))
        assert f"line {COUNT + 2}: {wrong} leads out of the folder" in message


def test_wrong_rows_are_listed_with_their_lines_or_left_out(tmp_path):
    pictures(tmp_path / "images")
    rows = [f"{i:02d}.jpg,{label(i)}" for i in range(COUNT)]
    wrong = {"gone.jpg,rose": "no picture gone.jpg below", "00.jpg,": "00.jpg has no label", ",rose": "names no image"}
    for at in (0, 5, COUNT):
        lines = ["image,label", *rows[:at], *wrong, *rows[at:]]
        message = refusal(write(tmp_path, lines))
        assert message.startswith(f"3 of the {COUNT + 3} rows of {tmp_path}/train.csv cannot be used")
        for offset, reason in enumerate(wrong.values()):
            assert f"\n  line {at + 2 + offset}: {reason}" in message
        dataset = load(tmp_path, on_bad_image="skip")
        assert right(dataset) and len(dataset.skipped) == 3
    # Without a header the first row is a row, though its picture is gone.
    assert "line 1: no picture gone.jpg" in refusal(write(tmp_path, ["gone.jpg,rose", *rows]))


def plain_rows(before: str = "", suffix: str = ".jpg") -> list[str]:
    return ["image,label", *(f"{before}{i:02d}{suffix},{label(i)}" for i in range(COUNT))]


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("suffix", [".jpg", ".JPG", ".Jpg", ""])
@pytest.mark.parametrize(
    "start", ["", "./", "images/", "Images/", "../set/images/", "../set/./images/../images/", "{root}/images/"]
)
def test_a_path_means_the_file_it_leads_to(tmp_path, start, suffix, windows):
    pictures(tmp_path / "set/images")
    start = start.format(root=tmp_path / "set")
    write(tmp_path / "set", plain_rows(start.replace("/", "\\") if windows else start, suffix))
    assert right(load(tmp_path / "set"))


@pytest.mark.parametrize("start", ["{there}/", "../there/"])
def test_of_paths_out_of_the_folder_the_cure_that_is_named_works(tmp_path, start):
    pictures(tmp_path / "there")
    (tmp_path / "set").mkdir()
    write(tmp_path / "set", plain_rows(start.format(there=tmp_path / "there")))
    assert "leads out of the folder; write the path in" in refusal(tmp_path / "set", image_column="image")
    assert right(load(tmp_path / "set", images=tmp_path / "there"))


@pytest.mark.parametrize("start", ["/content/drive/", "C:\\Users\\me\\", "data/", "https://host/"])
def test_of_paths_of_another_machine_the_file_of_that_name_is_pointed_to(tmp_path, start):
    pictures(tmp_path / "images")
    write(tmp_path, [*plain_rows("images/"), f"{start}images/03.jpg,rose", f"{start}03.png,rose"])
    assert refusal(tmp_path).count("; there is images/03.jpg") == 2
    for rows in (plain_rows(start), plain_rows(start, ".png")):
        message = refusal(write(tmp_path, rows))
        assert "names pictures below" in message and message.endswith("; there is images/00.jpg")


@pytest.mark.parametrize("word", ["nan", "NaN", "NAN", "<NA>", "NaT", "null", "NULL", "#N/A"])
def test_what_tools_write_for_no_label_is_no_class(tmp_path, word):
    pictures(tmp_path)
    rows = plain_rows()
    rows[4] = f"03.jpg,{word}"
    message = refusal(write(tmp_path, rows))
    assert f"line 5: 03.jpg has no label (but '{word}'; if that is a class, name it in data.classes)" in message
    assert right(load(tmp_path, on_bad_image="skip"))
    assert load(tmp_path, classes=["rose", "tulip", word], shots=1).classes == ["rose", "tulip", word]


@pytest.mark.parametrize("point", ["", ".", ".0", ".00"])
def test_numbers_of_pandas_are_named_by_the_classes(tmp_path, point):
    pictures(tmp_path)
    write(tmp_path, ["image,label", *(f"{i:02d}.jpg,{i % 2}{point}" for i in range(COUNT))])
    assert right(load(tmp_path, classes=["tulip", "rose"]))


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_delimiter_that_excel_writes_first_is_taken(tmp_path, delimiter, end):
    pictures(tmp_path)
    rows = [row.replace(",", delimiter) for row in plain_rows()]
    (tmp_path / "x.csv").write_bytes(end.join([f"sep={delimiter}", *rows, f"gone.jpg{delimiter}rose"]).encode())
    assert f"line {COUNT + 3}: no picture gone.jpg" in refusal(tmp_path)
    assert right(load(tmp_path, on_bad_image="skip"))


@pytest.mark.parametrize("at", [1, 5, COUNT])
@pytest.mark.parametrize("damage", ['"03.jpg,rose', '03.jpg,"rose', '"03.jpg" x,rose'])
def test_a_quote_that_is_not_closed_is_found(tmp_path, at, damage):
    rows = plain_rows()
    pictures(tmp_path)
    rows[at] = damage
    assert f"in the row that begins in line {at + 1}" in refusal(write(tmp_path, rows))


def test_columns_without_names_are_to_be_named(tmp_path):
    pictures(tmp_path)
    rows = [f"{row},x{i}" for i, row in enumerate(plain_rows()[1:])]
    for values in ({}, {"label_column": "label"}):
        assert "Put a first line into it that names the columns" in refusal(write(tmp_path, rows), **values)
    assert right(load(write(tmp_path, ["image,label,note", *rows])))


def test_several_labels_for_a_picture_are_refused(tmp_path):
    pictures(tmp_path)
    rows = [f"{i:02d}.jpg,{label(i)}" for i in range(COUNT)]
    message = refusal(write(tmp_path, ["image,label", *rows, "03.jpg,tulip"]))
    assert "03.jpg: 'rose' in line 5, 'tulip' in line 18" in message
    notes = load(write(tmp_path, ["image,label", *rows, "03.jpg,rose"])).notes()
    assert "1 rows name a picture again that an earlier one names" in notes


def test_a_column_of_splits_is_used(tmp_path):
    pictures(tmp_path)
    parts = ["Training"] * 8 + ["val"] * 4 + ["TEST"] * 4
    rows = [f"{i:02d}.jpg,{label(i)},{parts[i]}" for i in range(COUNT)]
    dataset = load(write(tmp_path, ["image,label,split", *rows]))
    assert right(dataset) and dataset.notes()[0].endswith("splits from column 'split'")
    numbers = {role: {int(Path(e.example_id).stem) for e in split} for role, split in dataset.splits.items()}
    assert numbers["train"] <= set(range(8)) and numbers["validation"] <= set(range(8, 12))
    assert numbers["test"] <= set(range(12, 16))
    assert "6 images, but 4 are left in the set's own" in refusal(tmp_path, splits={"train": "Training", "test": "val"})
    swapped = load(tmp_path, splits={"train": "Training", "test": "val"}, test=2)
    assert {int(Path(e.example_id).stem) for e in swapped.test} <= set(range(8, 12))
    assert "4 rows belong to no split and are left out" in swapped.notes()


def test_columns_that_cannot_be_told_are_asked_for(tmp_path):
    pictures(tmp_path)
    rows = [f"{i:02d}.jpg,{label(i)},f{i}" for i in range(COUNT)]
    message = refusal(write(tmp_path, ["picture,genus,family", *rows]))
    assert "which column" in message and "data.label_column to one of genus, family" in message
    assert right(load(tmp_path, label_column="genus"))
    assert "has no column 'genera'; it has picture, genus, family" in refusal(tmp_path, label_column="genera")
    assert "has no column 'x'" in refusal(tmp_path, image_column="x")


def test_numbers_are_named_by_the_classes(tmp_path):
    pictures(tmp_path)
    write(tmp_path, ["image,label", *(f"{i:02d}.jpg,{i % 2}" for i in range(COUNT))])
    assert load(tmp_path).classes == ["0", "1"]
    assert right(load(tmp_path, classes=["tulip", "rose"]))
    assert load(tmp_path, classes=["1", "0"]).classes == ["1", "0"]
    assert "there is a label 1" in refusal(tmp_path, classes=["tulip"])


def test_pictures_elsewhere_and_names_in_several_folders(tmp_path):
    pictures(tmp_path / "here/a")
    pictures(tmp_path / "here/b", start=100)
    rows = [f"{i:02d}.jpg,{label(i)}" for i in range(COUNT)]
    message = refusal(write(tmp_path / "here", ["image,label", *rows]))
    assert "line 2: 00.jpg may be a/00.jpg, b/00.jpg: write its path, or set data.images" in message
    dataset = load(tmp_path / "here", images=tmp_path / "here/b")
    assert right(dataset)
    (tmp_path / "there").mkdir()
    message = refusal(write(tmp_path / "there", ["image,label", *rows]))
    assert "no column of" in message and "Set data.images to the folder" in message
    assert right(load(tmp_path / "there", images=tmp_path / "here/a"))
    notes = load(write(tmp_path / "there", ["image,label", *rows[:14]]), images=tmp_path / "here/a").notes()
    assert f"left out 2 pictures in {tmp_path}/here/a that no row names" in notes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n\n,,\n", "is empty"),
        (b"image\n00.jpg\n", "has one column"),
        (b"image,label\n00.jpg,ros\xe9\n", "is not UTF-8 text"),
        (b"a,b\n1,2\n", "names pictures below"),
        (b"image,label\n", "has a header and no rows"),
        ("image,label\n00.jpg,rose\n".encode("utf-16-le"), "holds zero bytes"),
        ("image,label\n00.jpg,rose\n".encode("utf-16-be"), "holds zero bytes"),
        (b"PK\x03\x04\0\0a,b\n", "holds zero bytes"),
    ],
)
def test_a_file_that_is_no_such_table_is_explained(tmp_path, content, message):
    pictures(tmp_path)
    (tmp_path / "x.csv").write_bytes(content)
    assert message in refusal(tmp_path)
    assert "does not exist" in refusal(tmp_path / "none.csv")
    (tmp_path / "y.csv").touch()
    assert f"2 tables; name the one to learn from:\n  data.path={tmp_path}/x.csv" in refusal(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "holds no table" in refusal(tmp_path / "empty")


def test_the_documented_function_reads_such_a_table(tmp_path, monkeypatch):
    page = (Path(__file__).parents[3] / "docs/data.md").read_text()
    (tmp_path / "documented_data.py").write_text(page.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    pictures(tmp_path)
    rows = [f"{i:02d}.jpg,{label(i)},x" for i in range(COUNT - 1)] + [f"{COUNT - 1}.jpg,unsure,x", ""]
    (tmp_path / "labels.csv").write_text("\n".join(["name,label,note", *rows]), encoding="utf-8-sig")
    assert right(load(tmp_path, source="documented_data:my_dataset"))
    (tmp_path / "03.jpg").unlink()
    assert f"labels.csv, line 5: there is no {tmp_path}/03.jpg" in refusal(
        tmp_path, source="documented_data:my_dataset"
    )


ONE_HOT = {"0 and 1": "01", "fractions": ("0.0", "1.0"), "words": ("False", "TRUE")}


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("form", ONE_HOT)
@pytest.mark.parametrize("beside", ["", "width", "indoors", "split"])
def test_a_column_for_each_class(tmp_path, classes, form, beside):
    pictures(tmp_path, 4 * classes)
    names = [f"kind {chr(97 + i)}" for i in range(classes)]
    # A property that is not 0 or 1; one that is but once; the parts of the set.
    cells = {"": [], "width": ["640"], "indoors": ["?"], "split": ["train"]}[beside]
    off, on = ONE_HOT[form]
    rows = [
        ",".join([f"{i:02d}.jpg", *(on if i % classes == k else off for k in range(classes)), *cells])
        for i in range(4 * classes)
    ]
    dataset = load(write(tmp_path, [",".join(["image", *names, *([beside] if beside else [])]), *rows]), test=2)
    examples = [e for split in dataset.splits.values() for e in split]
    assert dataset.classes == names
    assert all(e.label == names[int(Path(e.example_id).stem) % classes] for e in examples)
    assert f"train.csv has a column for each class ({', '.join(names[:5])}" in "\n".join(dataset.remarks)


@pytest.mark.parametrize(("marks", "said"), [("0,0,0", "none"), ("1,0,1", "a and c"), ("1,1,1", "a and b and c")])
def test_a_row_that_marks_no_class_or_several(tmp_path, marks, said):
    pictures(tmp_path)
    rows = [f"{i:02d}.jpg,{','.join('1' if i % 3 == k else '0' for k in range(3))}" for i in range(COUNT - 1)]
    message = refusal(write(tmp_path, ["image,a,b,c", *rows, f"{COUNT - 1:02d}.jpg,{marks}"]))
    assert message.endswith(f"leave such rows out:\n  line {COUNT + 1}: {said}")


def test_properties_of_zeros_and_ones_are_no_classes(tmp_path):
    pictures(tmp_path)
    rows = [f"{i:02d}.jpg,{label(i)},{i % 2},{int(i % 4 < 2)}" for i in range(COUNT)]
    assert right(load(write(tmp_path, ["image,species,indoors,wet", *rows])))
    assert "which column" in refusal(write(tmp_path, ["image,kind,indoors,wet", *rows]))
    assert right(load(tmp_path, label_column="kind"))


@pytest.mark.parametrize("word", ["None", "NONE", "NA", "n/a", "N.A."])
def test_a_label_that_may_mean_none_is_said_to_be_a_class(tmp_path, word):
    pictures(tmp_path)
    rows = [f"{i:02d}.jpg,{'rose' if i % 2 else word}" for i in range(COUNT)]
    remarks = load(write(tmp_path, ["image,y", *rows])).remarks
    assert any(f"{word!r} is learned as a class" in remark for remark in remarks)


def test_a_column_for_each_class_is_not_guessed_beside_one_that_looks_like_labels(tmp_path):
    """Columns is_train and is_test would be learned as classes."""
    pictures(tmp_path)
    rows = [f"{i:02d}.jpg,{label(i)},{int(i < 10)},{int(i >= 10)}" for i in range(COUNT)]
    write(tmp_path, ["image,flower,is_train,is_test", *rows])
    message = refusal(tmp_path)
    assert "may have a column for each class (is_train, is_test), or the labels in flower: set data" in message
    assert right(load(tmp_path, label_column="flower"))


@pytest.mark.parametrize("wide", ["x" * 140_000, ",".join(["0.123456789"] * 12_000)])
def test_a_long_line_is_read_where_its_cells_are_short_and_else_explained(tmp_path, wide):
    pictures(tmp_path)
    columns = ",".join(f"p{number}" for number in range(wide.count(",") + 1))
    write(tmp_path, [f"image,label,{columns}", *(f"{i:02d}.jpg,{label(i)},{wide}" for i in range(COUNT))])
    if "," in wide:
        assert right(load(tmp_path))
    else:
        assert "train.csv cannot be read as a table: field larger than field limit" in refusal(tmp_path)


def test_links_in_a_circle_do_not_make_a_picture_of_many(tmp_path):
    pictures(tmp_path / "a/b")
    for number in range(3):  # each alone leads to ever deeper paths, several to more than could be counted
        (tmp_path / "a" / f"loop{number}").symlink_to("..")
        (tmp_path / "a/b" / f"again{number}").symlink_to("../..")
    (tmp_path / "itself").symlink_to("itself")
    write(tmp_path, ["image,label", *(f"{i:02d}.jpg,{label(i)}" for i in range(COUNT))])
    assert right(load(tmp_path))
    write(tmp_path, ["image,label", *(f"itself/{i:02d}.jpg,{label(i)}" for i in range(COUNT))])
    assert "there is a/b/00.jpg" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("pictures_in", "link", "target", "written"),
    [
        ("data/v1", "images", "data/v1", "data/v1"),
        ("data/v1", "images", "data/v1", "images"),
        ("v1", "latest", "v1", "latest"),
        ("a", "b", "a", "a"),
        ("a", "b", "a", "b"),
        ("b", "a", "b", "a"),
        (".store/x", "a", ".store", "a/x"),  # a hidden folder, which only the link leads to
        (".store/x", "a/b", "../.store", "a/b/x"),
    ],
)
@pytest.mark.parametrize("suffix", [".jpg", ""])
def test_a_picture_has_the_path_of_its_folder_and_of_a_link_to_that(
    tmp_path, pictures_in, link, target, written, suffix
):
    pictures(tmp_path / pictures_in)
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(target)
    rows = [f"{written}/{i:02d}{suffix},{label(i)}" for i in range(COUNT)]
    assert right(load(write(tmp_path, ["image,label", *rows])))
    bare = [f"{i:02d}{suffix},{label(i)}" for i in range(COUNT)]
    assert right(load(write(tmp_path, ["image,label", *bare])))


def test_notes_show_control_characters_of_a_table_s_name(tmp_path):
    pictures(tmp_path)
    rows = [f"{i:02d}.jpg,{label(i)}" for i in range(COUNT - 2)]
    written = "\n".join(load(write(tmp_path, ["image,label", *rows], name="tr\x1b[31main.csv")).notes())
    assert "\x1b" not in written and "tr\\x1b[31main.csv" in written
